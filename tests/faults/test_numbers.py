"""Numbers that are not finite: skipped on all processes without a trace, counted, and in the end explained."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.faults.harness import BEST, ROOT, leftovers, step_file, steps
from utils.checkpoint.files import first_nonfinite, load_checkpoint

SLOW = pytest.mark.faults
ONE_EPOCH = ("TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0")


def replay(dump: Path, *words: str) -> subprocess.CompletedProcess:
    """Run tools/replay.py on a dump."""
    command = [sys.executable, str(ROOT / "tools/replay.py"), str(dump), "--device", "cpu", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=dump.parent)


def assert_equal(first, second) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        for a, b in zip(first, second, strict=True):
            assert_equal(a, b)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.mark.parametrize(
    ("world", "opts", "value"),
    (
        pytest.param(2, (), float("inf"), id="2 processes, inf"),
        pytest.param(
            1, ("TRAIN.AMP=off", "TRAIN.ACCUMULATION_STEPS=2"), float("nan"), id="float32, groups", marks=SLOW
        ),
        pytest.param(3, ("TRAIN.AMP=fp16",), float("inf"), id="3 processes, fp16", marks=SLOW),
        pytest.param(2, ("TRAIN.OPTIMIZER.NAME=sgd",), -float("inf"), id="2 processes, SGD", marks=SLOW),
    ),
)
def test_one_bad_batch(starter, tmp_path, world, opts, value):
    """inf in one batch of one process: all skip that update, nothing moves, it is counted, the run completes."""
    bad = [("bad_pixels", {"first": 2, "last": 2, "rank": world - 1, "value": value})]
    for faults, step in (([], 1), (bad, 2)):  # saved by a stop right before and right after the bad update
        stop = [("send", {"number": signal.SIGTERM, "step": step})]
        job = starter.run(*opts, *ONE_EPOCH, out=tmp_path, world=world, faults=faults + stop).assert_ok("preempted")
    before, after = (load_checkpoint(step_file(job.folder, step)) for step in (2, 3))
    assert_equal(before["model"], after["model"])
    assert_equal(before["optimizer"]["state"], after["optimizer"]["state"])
    for rank in range(world):
        assert_equal(before["rank_state"][rank]["buffers"], after["rank_state"][rank]["buffers"])
        assert before["rank_state"][rank]["means"] == after["rank_state"][rank]["means"]
    skipped = before["guard"]["skipped"]  # float16 may have skipped while its scale settled
    assert (after["guard"]["skipped"], skipped) == (skipped + 1, 0 if "TRAIN.AMP=fp16" not in opts else skipped)
    if "TRAIN.AMP=fp16" in opts:
        assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2
    assert f"loss or gradient is not finite; 1 update(s) skipped, {skipped + 1} so far" in job.text()
    job = starter.run(*opts, *ONE_EPOCH, out=tmp_path, world=world).assert_ok()
    last = load_checkpoint(step_file(job.folder, max(steps(job.folder))))
    assert first_nonfinite(last["model"]) is first_nonfinite(last["ema"]) is None
    row = json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["skipped"] == last["guard"]["skipped"] > skipped
    assert isinstance(row["train_loss"], float)  # NaN would have become null


@pytest.mark.parametrize("world", (1, pytest.param(2, marks=SLOW)))
def test_diverged_for_good(starter, tmp_path, world):
    """Learning rate 1e20: stops after K skipped updates with a dump, nothing non-finite saved, replay explains."""
    rates = ("TRAIN.BASE_LR=1e20", "TRAIN.WARMUP_EPOCHS=0", "TRAIN.MAX_NONFINITE=3", "TRAIN.SAVE_STEPS=1")
    job = starter.run(*rates, out=tmp_path, world=world)
    job.assert_failed(
        "loss or gradient was not finite in 3 updates in a row (TRAIN.MAX_NONFINITE is 3)",
        "The last good checkpoint is ",
        "python tools/replay.py ",
    )
    assert "Traceback" not in job.text()
    assert "not finite in 3 updates in a row" in job.status()["error"]
    assert steps(job.folder) == [1]  # while updates are skipped, the files from before are not given up
    for path in job.folder.glob("*.pth"):
        payload = load_checkpoint(path)
        assert first_nonfinite(payload["model"]) is first_nonfinite(payload["ema"]) is None
    (dump,) = job.folder.glob("nonfinite_step_*.pth")
    assert str(dump) in job.text()
    result = replay(dump)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"update {int(dump.stem[-9:])} (epoch 1): {world} process(es), {4 * world} images")
    assert result.stdout.count("first module with a non-finite output: ") == world
    assert result.stdout.count(".png (index ") == 4 * world
    assert "largest weight: " in result.stdout


@SLOW
@pytest.mark.parametrize(
    ("world", "opts"),
    (
        (1, ()),
        (1, ("TRAIN.AMP=fp16", "TRAIN.ACCUMULATION_STEPS=2", "AUG.MIXUP=0", "AUG.CUTMIX=0")),
        (2, ("TRAIN.ACCUMULATION_STEPS=2", "DATA.NUM_WORKERS=1")),
        (3, ("TRAIN.AMP=off", "MODEL.DROP=True")),
        (2, ("TRAIN.GRAD_COMPRESSION=bf16",)),
        (2, ("TRAIN.FREEZE=stages2", "AUG.REPEATS=3", "TRAIN.LOSS.NAME=bce", "MODEL.HEAD_INIT_SCALE=0.1")),
    ),
    ids=(
        "1 process",
        "fp16, accumulation, no mixup",
        "2 processes, accumulation",
        "3 processes, float32, dropout",
        "2 processes, gradients in bf16",
        "2 processes, frozen parts, repeated augmentation",
    ),
)
def test_replay_repeats_the_update(starter, tmp_path, world, opts):
    """The dump of a healthy update: replay gets each process's loss and the gradient norm to the last bit."""
    faults = [("dump_update", {"step": 2})]  # by then float16 has found a scale at which nothing overflows
    job = starter.run(*opts, *ONE_EPOCH, out=tmp_path, world=world, faults=faults).assert_ok()
    result = replay(job.folder / "nonfinite_step_000000002.pth", "--samples", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    losses = [line for line in result.stdout.splitlines() if line.startswith("process ")]
    assert len(losses) == world
    assert all(line.endswith(": identical") for line in losses), result.stdout
    norm = next(line for line in result.stdout.splitlines() if line.startswith("gradient norm: "))
    assert norm.endswith("identical" if world < 3 else ("identical", "equal up to rounding")), result.stdout
    assert "non-finite" not in result.stdout


@SLOW
def test_replay_says_when_it_does_not_repeat(starter, tmp_path):
    """The bad values came from outside the update: replay finds other losses and says so, exit code 1."""
    bad = [("bad_pixels", {"first": 1, "last": 99, "rank": 1})]
    job = starter.run("TRAIN.MAX_NONFINITE=2", out=tmp_path, world=2, faults=bad).assert_failed("in 2 updates in a row")
    (dump,) = job.folder.glob("nonfinite_step_*.pth")
    result = replay(dump)
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("process ")]
    assert lines[0].endswith(": identical")
    assert lines[1].endswith("in the run nan: DIFFERENT")


@SLOW
def test_replay_of_something_else(reference, tmp_path):
    """A checkpoint, a missing file, data that have moved: exit code 2 and a reason."""
    for path, reason in ((reference(), "is a checkpoint, not the dump"), (tmp_path / "none.pth", "cannot read")):
        result = replay(path)
        assert result.returncode == 2
        assert reason in result.stderr
    result = replay(reference(), "--data-path", str(tmp_path))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@SLOW
@pytest.mark.parametrize("world", (1, 2))
def test_scores_that_are_no_numbers(starter, tmp_path, world):
    """A model whose validation scores are NaN: the run stops with a plain message, nothing becomes the best."""
    job = starter.run("TRAIN.SAVE_STEPS=2", out=tmp_path, world=world, faults=[("bad_scores", {})])
    job.assert_failed("evaluation: the model's scores are not finite for 21 of 21 samples")
    assert "Traceback" not in job.text()
    assert not (job.folder / BEST).exists()
    assert max(steps(job.folder)) == (12 if world == 1 else 6)
    assert leftovers(job.folder) == []
