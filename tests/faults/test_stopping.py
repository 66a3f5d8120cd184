"""Stops by signal and by the clock: all processes stop at the same update, save and say so; none is left behind."""

import signal
import socket
import time

import pytest

from tests.faults.harness import LAST, assert_same_state, leftovers, run_folder, steps
from utils.checkpoint.files import load_checkpoint

SLOW = pytest.mark.faults
SLOWLY = ("slow_updates", {"seconds": 0.2})


def started(job) -> bool:
    """Whether the first update has been logged."""
    return "epoch 1/2 update 1/" in job.text()


@SLOW
@pytest.mark.parametrize(
    "number", (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP), ids=lambda number: number.name
)
def test_signal_to_one_process(starter, reference, tmp_path, number):
    """A signal to one of two processes: both stop at the same update, saved, status written, same state at the end."""
    faults = [("send", {"number": number, "step": 2, "rank": 1})]
    job = starter.run(out=tmp_path, world=2, faults=faults).assert_ok("preempted")
    status = job.status()
    assert (status["reason"], status["step"], status["checkpoint"]) == (number.name, 3, "checkpoint_step_000000003.pth")
    assert f"stopped: {number.name}. Continue with the same command" in job.text()
    assert load_checkpoint(job.folder / LAST)["progress"]["global_step"] == 3
    job.assert_no_orphans()
    job = starter.run(out=tmp_path, world=2).assert_ok()
    assert_same_state(job.folder / LAST, reference(world=2))


@pytest.mark.parametrize(
    ("number", "world", "workers"),
    (
        pytest.param(signal.SIGTERM, 1, 2, id="SIGTERM, 1 process"),
        pytest.param(signal.SIGINT, 2, 2, id="SIGINT, 2 processes", marks=SLOW),
        pytest.param(signal.SIGUSR1, 2, 2, id="SIGUSR1, 2 processes", marks=SLOW),
        pytest.param(signal.SIGTERM, 3, 1, id="SIGTERM, 3 processes", marks=SLOW),
    ),
)
def test_signal_to_everything(starter, reference, tmp_path, number, world, workers):
    """A signal to all processes and their data workers: workers live until the save is done, no orphans."""
    opts = (f"DATA.NUM_WORKERS={workers}", "PRINT_FREQ=1")
    job = starter.start(*opts, out=tmp_path, world=world, faults=[SLOWLY])
    job.wait_for(lambda: started(job) and len(job.processes()) == world * (1 + workers), "its workers")
    for rank in range(world):
        job.signal(number, rank, group=True)
    job.wait().assert_ok("preempted")
    assert "exited unexpectedly" not in job.text()
    job.assert_no_orphans()
    job = starter.run(*opts, out=tmp_path, world=world).assert_ok()
    assert_same_state(job.folder / LAST, reference(world=world))


@SLOW
def test_time_limit(starter, reference, tmp_path):
    """MAX_RUN_MINUTES: stops by itself, status preempted; run after run it comes to the same end."""
    job, runs = None, 0
    while job is None or job.status()["state"] == "preempted":
        runs += 1
        assert runs < 20
        job = starter.run("TRAIN.MAX_RUN_MINUTES=0.025", out=tmp_path, world=2, faults=[SLOWLY])
        assert job.codes == [0, 0], job.text()
        assert job.status()["state"] == "completed" or job.status()["reason"] == "TRAIN.MAX_RUN_MINUTES reached"
    assert runs > 1
    assert_same_state(job.folder / LAST, reference(world=2))


@pytest.mark.parametrize("number", (signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW)), ids=lambda n: n.name)
def test_signal_before_the_first_update(starter, reference, tmp_path, number):
    """A signal while the run is being built: it ends at once and says so; started again: same state."""
    job = starter.run(out=tmp_path, faults=[("signal_at_start", {"number": number})]).assert_ok("preempted")
    assert f"stopped: {number.name}; nothing was saved, as no update was done" in job.text()
    assert "Traceback" not in job.text()
    assert job.status()["reason"] == number.name
    assert steps(job.folder) == []
    job = starter.run(out=tmp_path).assert_ok()
    assert_same_state(job.folder / LAST, reference())


def test_signal_to_one_process_before_the_first_update(starter, tmp_path):
    """A signal to one of two processes while they are being built: both end as stopped, none as failed."""
    job = starter.run(out=tmp_path, world=2, faults=[("signal_at_start", {"number": signal.SIGTERM, "rank": 1})])
    assert job.codes == [128 + signal.SIGTERM] * 2, job.text()
    assert job.status()["state"] == "preempted"
    assert "ERROR" not in job.text()


@SLOW
def test_signal_to_rank_0_before_the_first_update(starter, tmp_path):
    """Without torchrun, what the processes share ends with rank 0: the other says so, not that it failed."""
    job = starter.run(out=tmp_path, world=2, faults=[("signal_at_start", {"number": signal.SIGTERM, "rank": 0})])
    assert job.codes == [128 + signal.SIGTERM, 1], job.text()
    assert job.status()["state"] == "preempted"
    assert "because rank 0 has ended (its own log says why)" in job.logs[1].read_text()


@SLOW
def test_every_update_a_stop(starter, reference, tmp_path):
    """Stopped after every single update, at two processes: same state as uninterrupted."""
    last = load_checkpoint(reference(world=2))["progress"]["global_step"]
    for step in range(last):
        stop = [("send", {"number": signal.SIGTERM, "step": step, "rank": step % 2})]
        job = starter.run(out=tmp_path, world=2, faults=stop)
        assert job.codes == [128 + signal.SIGTERM] * 2, job.text()
        assert load_checkpoint(job.folder / LAST)["progress"]["global_step"] == step + 1
    job = starter.run(out=tmp_path, world=2).assert_ok()
    assert_same_state(job.folder / LAST, reference(world=2))


@SLOW
@pytest.mark.parametrize(("world", "rank"), ((2, 1), (2, 0), (3, 1)))
def test_killed_process_ends_the_others(starter, tmp_path, world, rank):
    """SIGKILL to one process: the others end within seconds, not after DIST_TIMEOUT, and leave no orphans."""
    kill = [("send", {"number": signal.SIGKILL, "step": 2, "rank": rank})]
    opts = ("TRAIN.DIST_TIMEOUT=1800", "DATA.NUM_WORKERS=1")
    job = starter.run(*opts, out=tmp_path, world=world, faults=kill, seconds=120)
    assert job.codes[rank] == -signal.SIGKILL
    assert all(code == 1 for number, code in enumerate(job.codes) if number != rank)
    assert steps(job.folder) == []
    job.assert_no_orphans()


@SLOW
@pytest.mark.parametrize("rank", (0, 1))
def test_hanging_process_ends_the_others(starter, tmp_path, rank):
    """A process hangs in an update: the other one gives up after DIST_TIMEOUT and says which one it waited in."""
    job = starter.start("TRAIN.DIST_TIMEOUT=10", out=tmp_path, world=2, faults=[("hang", {"step": 3, "rank": rank})])
    job.wait_for(lambda: job.poll()[1 - rank] is not None, "the other's end", seconds=120)
    job.kill()
    log = job.logs[1 - rank].read_text()
    assert f"rank {1 - rank} on {socket.gethostname()} stops while training: " in log
    assert "Timed out" in log
    assert "at epoch 1/2 update 3/6 (step 3)" in log
    job.wait()
    assert steps(run_folder(tmp_path)) == []


@SLOW
@pytest.mark.parametrize(("rank", "world"), ((0, 1), (1, 2)))
def test_failure_while_building(starter, tmp_path, rank, world):
    """One process cannot build its model: all end, the reason is on the console."""
    fault = [("failing_start", {"rank": rank, "message": "no such model"})]
    job = starter.run("TRAIN.DIST_TIMEOUT=1800", out=tmp_path, world=world, faults=fault, seconds=120)
    job.assert_failed(f"rank {rank} on {socket.gethostname()} stops: no such model")
    job.assert_no_orphans()


@pytest.mark.parametrize("world", (1, pytest.param(2, marks=SLOW)))
def test_killed_data_worker(starter, tmp_path, world):
    """The kernel kills a data worker: an error that names memory and NUM_WORKERS, all processes end."""
    opts = ("DATA.NUM_WORKERS=1", "TRAIN.DIST_TIMEOUT=1800")
    job = starter.run(*opts, out=tmp_path, world=world, faults=[("killed_worker", {"index": 30})], seconds=120)
    job.assert_failed("memory (RAM, or /dev/shm in a container): lower DATA.NUM_WORKERS")
    if world == 1:
        assert "lower DATA.NUM_WORKERS" in job.status()["error"]
    assert leftovers(job.folder) == []
    assert job.status()["state"] == "failed"
    job.assert_no_orphans()


@SLOW
def test_storage_that_hangs(starter, tmp_path):
    """Reading an image never returns: an error after LOADER_TIMEOUT that asks about the storage, no orphans."""
    opts = ("DATA.NUM_WORKERS=2", "DATA.LOADER_TIMEOUT=6")
    started_at = time.monotonic()
    job = starter.run(*opts, out=tmp_path, faults=[("stuck_storage", {"index": 30})], seconds=120)
    assert time.monotonic() - started_at < 60
    job.assert_failed("DataLoader timed out", "does the storage of DATA.DATA_PATH hang?")
    job.assert_no_orphans()
