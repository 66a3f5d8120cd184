"""The SLURM batch script, with stand-ins for SLURM's commands: what it starts, and when it requeues."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import LAST, ROOT, assert_same_state, free_port, run_folder

SCRIPT = ROOT / "docs" / "slurm" / "train.sbatch"
SLOW = pytest.mark.faults

SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$CALLS"; fi
"""
# what a run would do: leave its command line and a status, and fail as torchrun does after a signal
SRUN_STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$CALLS.srun"
if [[ -n $STATUS ]]; then mkdir -p "$FOLDER"; echo "$STATUS" > "$FOLDER/status.json"; fi
exit 1
"""
SRUN_REAL = """#!/usr/bin/env bash
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path, starter) -> Callable[..., tuple[list[str], dict[str, str]]]:
    """A function that prepares the script's command and environment with a given srun."""

    def prepare(srun: str, **environment: str) -> tuple[list[str], dict[str, str]]:
        commands = tmp_path / "commands"
        commands.mkdir(exist_ok=True)
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        command = ["bash", str(SCRIPT), "--cfg", str(starter.config), "--output", str(tmp_path / "out")]
        return command, {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": "77",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_GPUS_ON_NODE": "2",
            "MASTER_PORT": str(free_port()),
            "CALLS": str(tmp_path / "calls"),
            "FOLDER": str(run_folder(tmp_path / "out")),
            "STATUS": "",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        }

    return prepare


def decide(slurm, tmp_path: Path, status: dict | None, before: dict | None = None) -> tuple[int, str, bool]:
    """Run the script with a stand-in for the training; return exit code, output, and whether it requeued."""
    if before:
        run_folder(tmp_path / "out").mkdir(parents=True)
        (run_folder(tmp_path / "out") / "status.json").write_text(json.dumps(before))
    command, environment = slurm(SRUN_STAND_IN, STATUS=json.dumps(status) if status else "")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    calls = tmp_path / "calls"
    return result.returncode, result.stdout + result.stderr, calls.exists() and calls.read_text() == "requeue 77\n"


@pytest.mark.parametrize(
    ("status", "code", "requeued"),
    (
        pytest.param({"state": "preempted", "reason": "SIGUSR1", "step": 9}, 0, True, id="time limit"),
        pytest.param(
            {"state": "preempted", "reason": "TRAIN.MAX_RUN_MINUTES reached"}, 0, True, id="its own", marks=SLOW
        ),
        pytest.param({"state": "preempted", "reason": "SIGTERM"}, 0, False, id="cancelled", marks=SLOW),
        pytest.param({"state": "completed"}, 0, False, id="completed", marks=SLOW),
        pytest.param({"state": "failed", "error": "x"}, 1, False, id="failed", marks=SLOW),
        pytest.param({"state": "running"}, 1, False, id="killed hard", marks=SLOW),
        pytest.param(None, 1, False, id="never began", marks=SLOW),
    ),
)
def test_when_the_job_is_requeued(slurm, tmp_path, status, code, requeued):
    """SLURM script: requeues after a time limit only, and fails where the run failed."""
    returned, text, was_requeued = decide(slurm, tmp_path, status)
    assert (returned, was_requeued) == (code, requeued), text
    words = (tmp_path / "calls.srun").read_text().splitlines()
    assert words[words.index("--signals-to-handle") + 1] == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    assert words[words.index("--nproc_per_node") + 1] == "2"
    assert words[words.index("main.py") + 1] == "--cfg"


@SLOW
def test_old_status_does_not_count(slurm, tmp_path):
    """SLURM script: the run dies before it writes a status, the old one says preempted: not requeued for ever."""
    returned, text, requeued = decide(slurm, tmp_path, None, before={"state": "preempted", "reason": "SIGUSR1"})
    assert (returned, requeued) == (1, False), text


@SLOW
@pytest.mark.parametrize(("count", "kept"), (("0", True), ("1", False)), ids=("first", "second"))
def test_resume_is_for_the_first_allocation(slurm, tmp_path, count, kept):
    """SLURM script: --resume is passed on in the first allocation only, or each would start from that file again."""
    command, environment = slurm(SRUN_STAND_IN, SLURM_RESTART_COUNT=count)
    subprocess.run([*command, "--resume", "start.pth", "--resume=b.pth", "--tag", "x"], env=environment, timeout=240)
    words = (tmp_path / "calls.srun").read_text().splitlines()
    assert ("--resume" in words, "start.pth" in words, "--resume=b.pth" in words) == (kept, kept, kept)
    assert words[-2:] == ["--tag", "x"]


@SLOW
def test_mistake_on_the_command_line(slurm, tmp_path):
    """SLURM script: a mistyped flag ends the job before anything is launched."""
    command, environment = slurm(SRUN_STAND_IN)
    command += ["--batch-sze", "3"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2
    assert "did you mean --batch-size?" in result.stderr
    assert not (tmp_path / "calls.srun").exists()


@SLOW
def test_two_allocations(slurm, reference, tmp_path):
    """SLURM script with real torchrun: SIGUSR1, saved, requeued, and the second allocation ends in the same bits."""
    command, environment = slurm(SRUN_REAL)
    log, output = run_folder(tmp_path / "out") / "log_rank0.txt", tmp_path / "first.txt"
    with open(output, "w") as file:
        job = subprocess.Popen([*command, "--opts", "PRINT_FREQ=1"], env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 240
        while not (log.exists() and "update 1/" in log.read_text()):
            assert job.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        os.kill(_launcher_of(job.pid), signal.SIGUSR1)
        assert job.wait(240) == 0, output.read_text()
    finally:
        job.kill()
    assert "stopped by SIGUSR1, requeueing" in output.read_text()
    assert (tmp_path / "calls").read_text() == "requeue 77\n"
    environment["SLURM_RESTART_COUNT"] = "1"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "completed" in result.stdout
    assert (tmp_path / "calls").read_text() == "requeue 77\n"
    assert_same_state(log.with_name(LAST), reference(world=2))


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    """SLURM script: shellcheck has no complaint."""
    result = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_syntax():
    """SLURM script: bash reads it."""
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def _launcher_of(pid: int) -> int:
    """Process id of the launcher that the script has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(fields[1]) == pid and b"torch.distributed.run" in words:
            return int(folder.name)
    raise AssertionError("the launcher is not running")
