"""torchrun, as real processes: signals to the launcher, and restarts by it."""

import signal

import pytest

from tests.faults.harness import LAST, assert_same_state, free_port, step_file

pytestmark = pytest.mark.faults
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # what docs/slurm/train.sbatch passes


def torchrun(*words: str) -> tuple[str, ...]:
    return ("--nnodes", "1", "--nproc_per_node", "2", "--master_port", str(free_port()), *words)


@pytest.mark.parametrize(
    "number", (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP), ids=lambda number: number.name
)
def test_signal_to_the_launcher(starter, reference, tmp_path, number):
    """A signal to torchrun with our flags: forwarded, saved, status written, no orphans, same state at the end."""
    words = torchrun("--signals-to-handle", SIGNALS)
    slow = [("slow_updates", {"seconds": 0.5})]
    job = starter.launch("PRINT_FREQ=1", "DATA.NUM_WORKERS=1", out=tmp_path, torchrun=words, faults=slow)
    job.wait_for(lambda: "epoch 1/2 update 2/" in job.text(), "its second update")
    job.signal(number)
    job.wait()
    # torchrun's own exit code is 1 whatever its processes return: only status.json tells
    assert job.status()["state"] == "preempted", job.text()
    assert job.status()["reason"] == number.name
    assert "exited unexpectedly" not in job.text()
    job.assert_no_orphans()
    job = starter.launch("DATA.NUM_WORKERS=1", out=tmp_path, torchrun=torchrun()).wait().assert_ok()
    assert_same_state(job.folder / LAST, reference(world=2))


@pytest.mark.parametrize("attempt", range(5))
def test_restart_by_the_launcher(starter, reference, tmp_path, attempt):
    """torchrun --max-restarts 1 after SIGKILL of a process: it recovers, same state as uninterrupted."""
    once = {"number": signal.SIGKILL, "step": 3, "rank": attempt % 2, "once": str(tmp_path / "struck")}
    words = ("--standalone", "--nproc_per_node", "2") if attempt % 2 else torchrun()
    job = starter.launch(
        "TRAIN.SAVE_STEPS=2",
        "DATA.NUM_WORKERS=1",
        out=tmp_path / "out",
        torchrun=(*words, "--max-restarts", "1"),
        faults=[("saves_complete", {}), ("send", once)],
    )
    job.wait().assert_ok()
    assert (tmp_path / "struck").exists()
    assert "resumed from" in job.text()
    assert_same_state(job.folder / LAST, reference(world=2))
    job.assert_no_orphans()


def test_a_stop_is_no_reason_to_restart(starter, tmp_path):
    """torchrun --max-restarts 1, SIGTERM to a process: all stop, and the launcher does not start them again."""
    stop = [("send", {"number": signal.SIGTERM, "step": 2})]
    job = starter.launch(out=tmp_path, torchrun=torchrun("--max-restarts", "1"), faults=stop).wait()
    assert job.codes == [0], job.text()
    assert (job.status()["state"], job.status()["step"]) == ("preempted", 3)
    assert "resumed from" not in job.text()


def test_restart_of_an_explicit_resume(starter, reference, tmp_path):
    """torchrun --max-restarts 1 with --resume: the restart goes on from the newest file, not from the old one again."""
    first = starter.run(out=tmp_path / "a", world=2, faults=[("send", {"number": signal.SIGTERM, "step": 1})])
    once = {"number": signal.SIGKILL, "step": 5, "once": str(tmp_path / "struck")}
    job = starter.launch(
        "TRAIN.SAVE_STEPS=1",
        "--resume",
        str(first.folder / LAST),
        out=tmp_path / "b",
        torchrun=torchrun("--max-restarts", "1"),
        faults=[("saves_complete", {}), ("send", once)],
    )
    job.wait().assert_ok()
    assert job.text().count(f"resumed from {first.folder / LAST}") == 1
    assert f"resumed from {step_file(job.folder, 5)}" in job.text()
    assert_same_state(job.folder / LAST, reference(world=2))


def test_failing_run_under_the_launcher(starter, tmp_path):
    """A mistake of the user under torchrun: every process says it in one line, the launcher fails, no orphans."""
    job = starter.launch("MODEL.NUM_CLASSES=7", out=tmp_path, torchrun=torchrun()).wait()
    assert job.codes == [1]
    assert "MODEL.NUM_CLASSES" in job.text()
    job.assert_no_orphans()
