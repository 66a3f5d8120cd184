"""Launchers: what connects no processes is refused, and each mistake in the environment is one clear error."""

import os
import socket
import time
from collections.abc import Iterator

import pytest
import torch

from utils.errors import RunError
from utils.runtime import launch
from utils.runtime.launch import join_processes

CPU = torch.device("cpu")
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_", "RANK", "WORLD_SIZE", "MASTER_")):
            monkeypatch.delenv(name)


def refusal(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], seconds: float = 3.0) -> str:
    """Return the message with which this environment is refused."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError) as info:
        join_processes(CPU, seconds)
    return str(info.value)


SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n1"}


@pytest.mark.parametrize(
    "environment",
    (
        SRUN,
        {**SRUN, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"},
        {**SRUN, **TORCHRUN, "WORLD_SIZE": "1"},  # a torchrun per task, each for itself
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_SIZE": "4"},
    ),
    ids=("srun", "srun within an allocation", "torchrun that knows one process", "Open MPI", "MPICH"),
)
def test_processes_that_nothing_connects(monkeypatch, environment):
    text = refusal(monkeypatch, environment)
    assert "started 4 processes" in text
    assert "torchrun" in text
    assert "docs/slurm/train.sbatch" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
    ),
    ids=lambda value: "=".join(*value.items()) if isinstance(value, dict) else "",
)
def test_mistakes_in_the_environment(monkeypatch, changes, words):
    assert words in refusal(monkeypatch, {**TORCHRUN, **changes})


def test_half_an_environment(monkeypatch):
    assert "MASTER_ADDR, MASTER_PORT missing" in refusal(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2"})


def test_unknown_master_host(monkeypatch):
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(launch, "RESOLVE_SECONDS", 0.1)
    started = time.monotonic()
    text = refusal(monkeypatch, {**TORCHRUN, "MASTER_ADDR": "gpu-17"}, seconds=1800)
    assert time.monotonic() - started < 10
    assert "MASTER_ADDR is 'gpu-17', a host that is not known here (Name or service not known)" in text


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_busy_port(monkeypatch, busy_port):
    text = refusal(monkeypatch, {**TORCHRUN, "WORLD_SIZE": "1", "MASTER_PORT": str(busy_port)})
    assert f"127.0.0.1:{busy_port} (MASTER_ADDR, MASTER_PORT)" in text
    assert "EADDRINUSE" in text
    assert "--master_port" in text


def test_missing_peer(monkeypatch, caplog):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    monkeypatch.setattr(launch, "NOTICE_SECONDS", 0.2)
    text = refusal(monkeypatch, {**TORCHRUN, "MASTER_PORT": port}, seconds=2)
    assert f"rank 0 of 2 did not meet the other processes at 127.0.0.1:{port}" in text
    [record] = [r for r in caplog.records if "waits for the other processes" in r.message]
    assert "at most 2 s (TRAIN.DIST_TIMEOUT)" in record.message
