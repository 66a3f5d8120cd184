"""Fixtures of the fault tests, and the table that they end with."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import LAST, Starter, write_config

_outcomes: dict[str, tuple[str, str, float]] = {}


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts runs of the tiny config."""
    folder = tmp_path_factory.mktemp("faults")
    starter = Starter(folder, write_config(folder))
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def reference(starter: Starter) -> Callable[..., Path]:
    """Final checkpoint of the uninterrupted run with these settings and processes; each is made once."""
    done: dict[tuple, Path] = {}

    def final_state(*opts: str, world: int = 1) -> Path:
        key = (world, *opts)
        if key not in done:
            out = starter.folder / f"reference{len(done)}"
            starter.run(*opts, out=out, world=world).assert_ok()
            done[key] = out / "tiny" / "default" / LAST
        return done[key]

    return final_state


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Remember how each scenario ended."""
    report = (yield).get_result()
    if call.when == "call" or report.outcome != "passed":
        scenario = (item.function.__doc__ or item.name).strip().splitlines()[0].rstrip(".")
        case = f" [{item.callspec.id}]" if hasattr(item, "callspec") else ""
        _outcomes[item.nodeid] = (scenario + case, report.outcome, call.duration)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print scenario and outcome, if the long tests were asked for."""
    if not _outcomes or config.option.markexpr == "not faults":
        return
    terminalreporter.section("faults: scenario and outcome")
    width = min(100, max(len(scenario) for scenario, _, _ in _outcomes.values()))
    for scenario, outcome, seconds in _outcomes.values():
        terminalreporter.write_line(f"{scenario:<{width}}  {outcome:<7} {seconds:6.1f} s")
