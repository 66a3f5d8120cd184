"""Two hosts on one machine: network namespaces joined by a cable (veth) that can be cut, a torchrun on each.

Needs permission to make network namespaces (root); skipped elsewhere.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.harness import LAST, Job, Starter, assert_same_state, run_folder, steps
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
    names: Path

    @property
    def enter(self) -> tuple[str, ...]:
        """Command that runs another one on this host."""
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        return (
            *("ip", "netns", "exec", self.name),
            *("unshare", "--uts", "--mount", "sh", "-c", script, self.name, str(self.names)),
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
    table = tmp_path / "hosts"
    table.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
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
