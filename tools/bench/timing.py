"""Paired timing: all candidates take turns in one process, so that other load on the machine affects them alike."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

_MAX_REPEATS = 1000
_WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a few values. As text: ``1.23 (1.10 - 1.31)``."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise ``values``."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} - {self.high:.2f})"

    @property
    def range(self) -> str:
        """Smallest and largest value as text, three digits each."""
        return f"{self.low:.3g} - {self.high:.3g}"


class Stopwatch:
    """Times calls on a device: a GPU by its events, a CPU by wall time, or by CPU time where PyTorch has one thread.

    The CPU time of a process is disturbed less by other load, but it counts every thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        one_thread = torch.get_num_threads() == 1
        self._now = time.process_time if one_thread else time.perf_counter
        self.clock = "CUDA events" if device.type == "cuda" else "CPU time" if one_thread else "wall time"

    def seconds(self, run: Callable[[], object], repeats: int = 1) -> float:
        """Return the seconds per call, averaged over ``repeats`` calls in a row."""
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000 / repeats
        start = self._now()
        for _ in range(repeats):
            run()
        return (self._now() - start) / repeats


def measure_paired(
    runs: dict[str, Callable[[], object]], stopwatch: Stopwatch, *, rounds: int, min_seconds: float
) -> dict[str, list[float]]:
    """Time several callables against each other, with a progress bar.

    Each is warmed up first. In every round, each is then called often enough to take ``min_seconds``.

    Args:
        runs: what to time, by name.
        stopwatch: the clock.
        rounds: measurements of each.
        min_seconds: length of one measurement.

    Returns:
        Seconds per call in each round, by name.
    """
    repeats = {}
    with tqdm(runs.items(), leave=False) as bar:
        for name, run in bar:
            bar.set_description(f"warm up {name}")
            for _ in range(_WARM_UP_CALLS):
                run()
            repeats[name] = min(_MAX_REPEATS, max(1, round(min_seconds / max(stopwatch.seconds(run), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in turns(runs, rounds):
        times[name].append(stopwatch.seconds(runs[name], repeats[name]))
    return times


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield each name once per round, in reversed order in every second round, with a progress bar."""
    orders = [list(names) if number % 2 == 0 else list(names)[::-1] for number in range(rounds)]
    with tqdm(total=rounds * len(list(names)), desc="measure", leave=False) as bar:
        for name in (name for order in orders for name in order):
            yield name
            bar.update()


def paired_ratio(times: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Return how many times as fast as the baseline: the spread of the ratios of the single rounds."""
    return Spread.of([other / own for own, other in zip(times, baseline, strict=True)])
