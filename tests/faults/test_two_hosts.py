"""Two hosts on one machine: network namespaces joined by a cable (veth) that can be cut, a torchrun on each.

Needs permission to make network namespaces (root); skipped elsewhere.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.harness import LAST, PATIENCE, Job, Starter, assert_same_state, run_folder, steps
from tests.faults.test_launchers import SIGNALS

pytestmark = pytest.mark.faults
PORT = 29400
SLOW = [("slow_updates", {"seconds": 0.4})]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Host:
    """A network namespace with one interface, eth0, and a host name of its own."""

    starter: Starter
    name: str
    main: str
    etc: Path

    @property
    def enter(self) -> tuple[str, ...]:
        """Command that runs another one on this host."""
        script = 'hostname "$0" && mount --bind "$1/hosts" /etc/hosts && mount --bind "$1/nss" /etc/nsswitch.conf'
        script += ' && shift && exec "$@"'
        return (
            *("ip", "netns", "exec", self.name),
            *("unshare", "--uts", "--mount", "sh", "-c", script, self.name, str(self.etc)),
        )

    def cable(self, state: str) -> None:
        """Cut the cable (``down``) or join it again (``up``)."""
        _ip("-n", self.name, "link", "set", "eth0", state)

    def torchrun(self, *opts: str, out: Path, restarts: int = 3, env: dict[str, str] | None = None, **request) -> Job:
        """Start this host's torchrun, with one process."""
        words = (
            *("--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", str(restarts), "--rdzv_backend", "c10d"),
            *("--rdzv_id", "job", "--rdzv_endpoint", f"{self.main}:{PORT}", "--signals-to-handle", SIGNALS),
        )
        env = {"GLOO_SOCKET_IFNAME": "eth0", **(env or {})}
        return self.starter.launch(*opts, out=out, torchrun=words, host=self.enter, env=env, **request)


@pytest.fixture
def hosts(starter: Starter, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that know each other by name."""
    addresses = {f"host-{letter}-{os.getpid()}": f"10.213.7.{number}" for number, letter in enumerate("ab", start=1)}
    names = list(addresses)
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in addresses.items():
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _ip("-n", name, "link", "set", interface, "up")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        _remove(names)
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    table = tmp_path / "etc"
    table.mkdir()
    (table / "nss").write_text("hosts: files\n")  # no name server can be reached from here
    (table / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    yield tuple(Host(starter, name, names[0], table) for name in names)
    _remove(names)


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_hosts_end_in_the_bits_of_one(hosts, reference, tmp_path):
    """Two hosts with one process each and a common output folder: the state of two processes on one host."""
    jobs = [host.torchrun(out=tmp_path / "out") for host in hosts]
    for job in jobs:
        job.wait()
    jobs[0].assert_ok()
    assert_same_state(run_folder(tmp_path / "out") / LAST, reference(world=2))


def launch(hosts: tuple[Host, Host], *opts: str, out: list[Path], **request) -> list[Job]:
    return [host.torchrun(*opts, out=folder, **request) for host, folder in zip(hosts, out, strict=True)]


def wait_for_checkpoint(jobs: list[Job]) -> None:
    jobs[0].wait_for(lambda: any("saved checkpoint_step_000000002" in job.text() for job in jobs), "its checkpoint")


@pytest.mark.parametrize("rank", (0, 1))
def test_killed_worker_with_separate_folders(hosts, reference, tmp_path, rank):
    """SIGKILL to the process of one host, each host with an output folder of its own: --max-restarts recovers."""
    out = [tmp_path / "a", tmp_path / "b"]
    once = [("send", {"number": signal.SIGKILL, "step": 5, "rank": rank, "once": str(tmp_path / "struck")})]
    jobs = launch(hosts, "TRAIN.SAVE_STEPS=2", out=out, faults=once)
    for job in jobs:
        job.wait()
    assert (tmp_path / "struck").exists()
    [main] = [job for job in jobs if (job.folder / LAST).exists()]
    main.assert_ok()
    assert "resumed from" in main.text()
    assert_same_state(main.folder / LAST, reference(world=2))
    [other] = [job for job in jobs if job is not main]
    assert steps(other.folder) == []
    assert "resumed from" in (other.folder / "log_rank1.txt").read_text()


def test_cut_cable(hosts, reference, tmp_path):
    """The cable is cut until both processes have given up, then joined again: --max-restarts recovers."""
    out = [tmp_path / "a", tmp_path / "b"]
    jobs = launch(hosts, "TRAIN.SAVE_STEPS=2", "TRAIN.DIST_TIMEOUT=8", "PRINT_FREQ=1", out=out, faults=SLOW)
    wait_for_checkpoint(jobs)
    hosts[1].cable("down")
    for job in jobs:
        job.wait_for(lambda job=job: "stops while" in job.text(), "the end of its process")
    hosts[1].cable("up")
    for job in jobs:
        job.wait()
    [main] = [job for job in jobs if (job.folder / LAST).exists()]
    main.assert_ok()
    assert_same_state(main.folder / LAST, reference(world=2))


def test_host_that_dies_and_comes_back(hosts, reference, tmp_path):
    """Everything on the second host is killed; a loop on each host starts torchrun again until it succeeds."""
    out = [tmp_path / "a", tmp_path / "b"]
    jobs = launch(hosts, "TRAIN.SAVE_STEPS=2", "PRINT_FREQ=1", out=out, faults=SLOW)
    wait_for_checkpoint(jobs)
    jobs[1].kill()
    deadline = time.monotonic() + 2 * PATIENCE
    while [code for job in jobs for code in job.poll()] != [0, 0]:
        for number, host in enumerate(hosts):
            if jobs[number].codes[0] not in (0, None):
                jobs[number] = host.torchrun("TRAIN.SAVE_STEPS=2", out=out[number])
        if time.monotonic() > deadline:
            texts = [job.text() for job in jobs]
            for job in jobs:
                job.kill()
            raise AssertionError("\n".join(texts))
        time.sleep(0.5)
    [main] = [job for job in jobs if (job.folder / LAST).exists()]
    main.assert_ok()
    assert "resumed from" in main.text()
    assert_same_state(main.folder / LAST, reference(world=2))
