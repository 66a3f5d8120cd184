"""Faults while a checkpoint is written: nothing half-written is visible, and all processes learn the reason."""

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.faults.harness import LAST, assert_same_state, figures, leftovers, run_folder, step_file, steps
from utils.checkpoint.files import load_checkpoint, verify_checkpoint

SLOW = pytest.mark.faults

FAILURES = {
    "disk full": ("full_disk", {"limit": 300_000}, ("File too large", "after ")),
    # not even status.json fits: the reason must still be the last word
    "disk full to the last byte": (
        "full_disk",
        {"limit": 300_000, "entirely": True},
        ("File too large", "status.json could not be written: [Errno 28]"),
    ),
    "unpicklable": ("unpicklable_entry", {}, ("this object cannot be pickled",)),
    "torch.save fails": ("failing_save", {"message": "the storage went away"}, ("the storage went away",)),
}


@pytest.mark.parametrize(
    ("name", "world"),
    (
        pytest.param("disk full", 2, id="disk full, 2 processes"),
        pytest.param("disk full to the last byte", 1, id="disk full to the last byte", marks=SLOW),
        pytest.param("unpicklable", 1, id="unpicklable object", marks=SLOW),
        pytest.param("unpicklable", 2, id="unpicklable object, 2 processes", marks=SLOW),
        pytest.param("torch.save fails", 3, id="torch.save fails, 3 processes", marks=SLOW),
    ),
)
def test_failing_write_ends_all_processes(starter, reference, tmp_path, name, world):
    """A save fails on rank 0: all processes end with path and reason, older file intact, no leftovers."""
    fault, arguments, words = FAILURES[name]
    opts = ("TRAIN.SAVE_STEPS=2",)
    job = starter.run(*opts, out=tmp_path, world=world, faults=[(fault, {"step": 4, **arguments})])
    target = step_file(job.folder, 4)
    job.assert_failed(f"cannot write checkpoint {target}", *words)
    assert job.text().count(f"stops while saving: cannot write checkpoint {target}") == 1
    assert job.text().count(f"because rank 0 on {socket.gethostname()} failed: cannot write") == world - 1
    assert "Traceback" not in job.text()
    assert steps(job.folder) == [2]
    verify_checkpoint(step_file(job.folder, 2))
    assert leftovers(job.folder) == []
    if name == "disk full to the last byte":
        assert job.status()["state"] == "running"
    else:
        assert job.status()["state"] == "failed"
        assert words[0] in job.status()["error"]
    job.assert_no_orphans()
    job = starter.run(*opts, out=tmp_path, world=world).assert_ok()
    assert_same_state(job.folder / LAST, reference(world=world))


@SLOW
def test_failing_rank_0_ends_the_others_within_seconds(starter, tmp_path):
    """The other ranks wait for rank 0's save with a time limit of half an hour: they end as soon as it fails."""
    save = [("failing_save", {"step": 2, "message": "the storage went away"})]
    job = starter.start("TRAIN.SAVE_STEPS=2", "TRAIN.DIST_TIMEOUT=1800", out=tmp_path, world=3, faults=save)
    log = run_folder(tmp_path) / "log_rank0.txt"
    job.wait_for(lambda: log.exists() and "storage went away" in log.read_text(), "the failure")
    started = time.monotonic()
    job.wait(60)
    assert time.monotonic() - started < 20  # seconds, on a machine that does other things too
    job.assert_failed("the storage went away")


@pytest.mark.parametrize("delay", (0.35, *(pytest.param(d, marks=SLOW) for d in (0.02, 0.15, 0.5, 0.75, 0.9, 1.05))))
def test_kill_while_saving(starter, reference, tmp_path, delay):
    """SIGKILL after a part of a save that takes a second: no unreadable visible file, leftovers cleared."""
    slow = [("slow_save", {"seconds": 1.0})]
    job = starter.start("TRAIN.SAVE_STEPS=3", out=tmp_path, faults=slow)
    job.wait_for(lambda: job.folder.is_dir() and leftovers(job.folder) and steps(job.folder), "its second save")
    time.sleep(delay)
    job.signal(signal.SIGKILL)
    job.wait()
    for path in job.folder.glob("*.pth"):
        verify_checkpoint(path)
    left = leftovers(job.folder)
    job = starter.run("TRAIN.SAVE_STEPS=3", out=tmp_path).assert_ok()
    assert not set(left) & set(leftovers(job.folder))
    assert_same_state(job.folder / LAST, reference())


def test_training_goes_on_while_a_checkpoint_is_written(starter, reference, tmp_path):
    """A save that takes a second: updates are done in that time, the end waits for the last file, same state."""
    slow = [("slow_save", {"seconds": 1.0})]
    job = starter.run("TRAIN.SAVE_STEPS=9", "PRINT_FREQ=1", out=tmp_path, faults=slow).assert_ok()
    places = [job.text().index(f"epoch 1/2 update {update}/") for update in (9, 10, 11, 12)]
    assert places[-1] < job.text().index(f"saved {step_file(job.folder, 9).name}")
    assert job.text().index(f"saved {step_file(job.folder, 24).name}") < job.text().index("done: best")
    assert (job.folder / "status.json").stat().st_mtime_ns > step_file(job.folder, 24).stat().st_mtime_ns
    assert_same_state(job.folder / LAST, reference())


@SLOW
def test_kill_of_the_training_while_a_checkpoint_is_written(starter, reference, tmp_path):
    """SIGKILL in a later update than the one that is being written: the file before it is there, same state."""
    faults = [("slow_save", {"seconds": 30.0, "step": 6}), ("send", {"number": signal.SIGKILL, "step": 8})]
    job = starter.run("TRAIN.SAVE_STEPS=3", out=tmp_path, faults=faults)
    assert job.codes == [-signal.SIGKILL]
    assert steps(job.folder) == [3]
    assert leftovers(job.folder) != []
    job = starter.run("TRAIN.SAVE_STEPS=3", out=tmp_path).assert_ok()
    assert f"resumed from {step_file(job.folder, 3)}" in job.text()
    assert_same_state(job.folder / LAST, reference())


@SLOW
@pytest.mark.parametrize("world", (1, 2))
@pytest.mark.parametrize("number", (1, 5, 6, 9, 10, 12, 17, 20, 25, 28, 29))
def test_kill_before_a_file_operation_of_a_save(starter, reference, tmp_path, number, world):
    """SIGKILL before an operation of the write in the background, which names the best and a milestone: same state."""
    words = ("TRAIN.SAVE_STEPS=5", "SAVE_FREQ=1")
    kill = [("kill_in_write", {"step": 10 // world, "number": number})]
    job = starter.run(*words, out=tmp_path, world=world, faults=kill)
    assert job.codes[0] == -signal.SIGKILL
    for path in job.folder.glob("*.pth"):
        verify_checkpoint(path)
    before = max(steps(job.folder))
    job = starter.run(*words, out=tmp_path, world=world).assert_ok()
    assert f"resumed from {step_file(job.folder, before)}" in job.text()
    assert_same_state(job.folder / LAST, reference(world=world))
    assert figures(job.folder) == figures(reference(world=world).parent)
    assert (job.folder / "ckpt_epoch_1.pth").exists()


@SLOW
def test_second_signal_while_saving(starter, reference, tmp_path):
    """SIGTERM, and more SIGTERM and SIGUSR1 while the save goes on: it completes, same state after continuing."""
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    faults = [("slow_save", {"seconds": 1.0, "signals": signals}), ("send", {"number": signal.SIGTERM, "step": 3})]
    job = starter.run(out=tmp_path, faults=faults).assert_ok("preempted")
    assert load_checkpoint(job.folder / LAST)["progress"]["global_step"] == 4
    job = starter.run(out=tmp_path).assert_ok()
    assert_same_state(job.folder / LAST, reference())


@SLOW
def test_second_interrupt_while_saving(starter, reference, tmp_path):
    """Ctrl-C twice, the second one during the save: the run ends at once, older file intact, no leftovers."""
    faults = [
        ("slow_save", {"seconds": 1.0, "signals": [signal.SIGINT], "step": 4}),
        ("send", {"number": signal.SIGINT, "step": 3}),
    ]
    job = starter.run("TRAIN.SAVE_STEPS=2", out=tmp_path, faults=faults)
    assert job.codes != [0]
    assert steps(job.folder) == [2]
    assert leftovers(job.folder) == []
    assert job.status()["state"] == "failed"
    job = starter.run("TRAIN.SAVE_STEPS=2", out=tmp_path).assert_ok()
    assert_same_state(job.folder / LAST, reference())


def test_two_runs_in_one_folder(starter, tmp_path):
    """A second run in the same folder is refused by pid and host; the first goes on, a third may follow."""
    first = starter.start(out=tmp_path, faults=[("slow_updates", {"seconds": 0.3})])
    first.wait_for(lambda: (first.folder / "status.json").exists(), "its start")
    before = {path.name for path in first.folder.iterdir()}
    second = starter.run(out=tmp_path)
    second.assert_failed(f"{first.folder} is in use by pid {first.pids[0]} on ")
    assert first.status()["pid"] == first.pids[0]
    assert before <= {path.name for path in first.folder.iterdir()}
    first.signal(signal.SIGTERM)
    first.wait().assert_ok("preempted")


@SLOW
def test_lock_of_a_killed_run_is_free(starter, tmp_path):
    """A run killed with its data workers alive does not keep the folder."""
    slow = [("slow_updates", {"seconds": 0.3})]
    first = starter.start("DATA.NUM_WORKERS=2", out=tmp_path, faults=slow)
    first.wait_for(lambda: (first.folder / "status.json").exists() and len(first.processes()) == 3, "its workers")
    first.signal(signal.SIGKILL)
    first.wait()
    starter.run(out=tmp_path).assert_ok()
    first.assert_no_orphans()


@SLOW
@pytest.mark.parametrize("world", (1, 2))
def test_output_folder_that_cannot_be_made(starter, tmp_path, world):
    """A file where the output folder should be: all processes say so before any work."""
    (tmp_path / "file").write_text("in the way")
    job = starter.run(out=tmp_path / "file", world=world, seconds=120)
    job.assert_failed(f"cannot write the output folder {Path(tmp_path / 'file' / 'tiny' / 'default')}", "--output")
    assert (tmp_path / "file").read_text() == "in the way"


@SLOW
def test_retention(starter, tmp_path):
    """SAVE_KEEP rolling files, all milestones, best and last: nothing else is left."""
    job = starter.run("TRAIN.SAVE_STEPS=2", "TRAIN.SAVE_KEEP=3", "SAVE_FREQ=1", out=tmp_path).assert_ok()
    assert steps(job.folder) == [20, 22, 24]
    names = {path.name for path in job.folder.glob("*.pth") if "step" not in path.name}
    assert names == {LAST, "checkpoint_best.pth", "ckpt_epoch_1.pth", "ckpt_epoch_2.pth"}
    assert load_checkpoint(job.folder / "ckpt_epoch_1.pth")["progress"]["global_step"] == 12
