"""A run that is interrupted anywhere and continued ends in the bits of one that was not."""

import json
import signal
from collections import Counter

import pytest
import torch

from tests.faults.harness import (
    LAST,
    TRAIN_IMAGES,
    assert_same_state,
    figures,
    run_folder,
    step_file,
    steps,
)
from utils.checkpoint.files import load_checkpoint

SLOW = pytest.mark.faults
PLAIN = ("TRAIN.AMP=off", "TRAIN.EMA_DECAY=0.0", "TRAIN.OPTIMIZER.NAME=sgd", "AUG.MIXUP=0", "AUG.CUTMIX=0")

TUNING = (
    "TRAIN.OPTIMIZER.NAME=lamb",
    "TRAIN.LAYER_DECAY=0.7",
    "TRAIN.FREEZE=stages2",
    "TRAIN.LOSS.NAME=bce",
    "MODEL.HEAD_INIT_SCALE=0.01",
    "AUG.MIXUP_OFF_EPOCHS=1",
    "AUG.REPEATS=3",
)


def stop_at(step: int, rank: int = 0) -> list:
    return [("send", {"number": signal.SIGTERM, "step": step, "rank": rank})]


@pytest.mark.parametrize(
    ("world", "workers", "opts"),
    (
        pytest.param(1, 2, ("TRAIN.ACCUMULATION_STEPS=5",), id="1 process, 2 workers, groups of 5+5+2"),
        pytest.param(3, 0, (), id="3 processes"),  # the case that needs DDP's warm-up
        pytest.param(1, 0, (), id="1 process", marks=SLOW),
        pytest.param(1, 0, ("TRAIN.AMP=fp16",), id="1 process, fp16 and its scaler", marks=SLOW),
        pytest.param(1, 0, PLAIN, id="1 process, float32, SGD, no mixup, no average", marks=SLOW),
        pytest.param(2, 0, (), id="2 processes", marks=SLOW),
        pytest.param(2, 0, (*TUNING, "TRAIN.ACCUMULATION_STEPS=2"), id="2 processes, fine-tuning", marks=SLOW),
        pytest.param(2, 0, (*TUNING, "TRAIN.AMP=fp16"), id="2 processes, fine-tuning in fp16", marks=SLOW),
        pytest.param(2, 2, ("TRAIN.ACCUMULATION_STEPS=2",), id="2 processes, 2 workers, accumulation", marks=SLOW),
        pytest.param(2, 0, ("TRAIN.GRAD_COMPRESSION=bf16",), id="2 processes, gradients in bf16", marks=SLOW),
        pytest.param(3, 2, ("TRAIN.ACCUMULATION_STEPS=2",), id="3 processes, 2 workers, accumulation", marks=SLOW),
    ),
)
def test_interrupted_run_ends_in_the_same_bits(starter, reference, tmp_path, world, workers, opts):
    """SIGTERM to one process mid-epoch, continued: same state as uninterrupted."""
    expected = reference(*opts, world=world)
    words = (*opts, f"DATA.NUM_WORKERS={workers}")
    last_step = load_checkpoint(expected)["progress"]["global_step"]
    for step in (1,) if (world, workers) == (3, 0) else (1, last_step // 2 + 1):
        job = starter.run(*words, out=tmp_path, world=world, faults=stop_at(step, rank=world - 1))
        job.assert_ok("preempted")
        assert (job.status()["step"], job.status()["reason"]) == (step + 1, "SIGTERM")
        assert step_file(job.folder, step + 1).exists()
    job = starter.run(*words, out=tmp_path, world=world).assert_ok()
    assert "resumed from" in job.text()
    assert_same_state(job.folder / LAST, expected)
    assert figures(job.folder) == figures(expected.parent)


@SLOW
def test_gradients_in_bf16_are_rounded_alike_on_all_processes(starter, tmp_path):
    """TRAIN.GRAD_COMPRESSION bf16: other bits than float32, by rounding alone."""
    opts = (
        "TRAIN.GRAD_COMPRESSION=bf16",
        "TRAIN.EPOCHS=1",
        "TRAIN.WARMUP_EPOCHS=0",
        "TRAIN.BASE_LR=1e-9",
        "TRAIN.WARMUP_LR=0",
        "TRAIN.MIN_LR=0",
    )
    job = starter.run(*opts, out=tmp_path, world=2).assert_ok()
    plain = starter.run("TRAIN.GRAD_COMPRESSION=none", *opts[1:], out=tmp_path / "plain", world=2).assert_ok()
    weights, expected = (load_checkpoint(folder / LAST)["model"] for folder in (job.folder, plain.folder))
    assert any(not torch.equal(weights[name], expected[name]) for name in weights)
    norms = [figures(folder)[0]["grad_norm"] for folder in (job.folder, plain.folder)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert norms[0] != norms[1]


@SLOW
def test_interrupted_distillation_ends_in_the_same_bits(starter, reference, tmp_path):
    """SIGTERM mid-epoch to one of two processes that learn from a teacher, continued: same state as uninterrupted."""
    opts = ("TRAIN.DISTILL.KIND=soft", f"TRAIN.DISTILL.TEACHER={reference()}")
    expected = reference(*opts, world=2)
    starter.run(*opts, out=tmp_path, world=2, faults=stop_at(3)).assert_ok("preempted")
    job = starter.run(*opts, out=tmp_path, world=2).assert_ok()
    assert "resumed from" in job.text()
    assert_same_state(job.folder / LAST, expected)


@SLOW
@pytest.mark.parametrize(
    ("backend", "opts"),
    (
        ("eager", ("TRAIN.ACCUMULATION_STEPS=2",)),
        ("aot_eager", ("TRAIN.USE_CHECKPOINT=True",)),
        ("eager", ("MODEL.TYPE=timm", "MODEL.TIMM_NAME=test_convnext")),
    ),
)
def test_compiled_processes_resume_with_the_same_bits(starter, tmp_path, backend, opts):
    """Two processes with compiled blocks, in bfloat16 with averaged weights, continued mid-epoch: same state."""
    words = ("--compile", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0", "TRAIN.SAVE_STEPS=1", "TRAIN.SAVE_KEEP=9", *opts)
    run = {"out": tmp_path, "world": 2, "faults": [("compile_with", {"backend": backend})]}
    whole = starter.run(*words, **run).assert_ok()
    assert "compiled and warmed up" in whole.text()
    again = starter.run(*words, "--tag", "again", "--resume", str(step_file(whole.folder, 2)), **run).assert_ok()
    assert "resumed from" in again.text()
    assert_same_state(again.folder / LAST, whole.folder / LAST)


@SLOW
@pytest.mark.parametrize("world", (1, 2, 3))
def test_killed_run_ends_in_the_same_bits(starter, reference, tmp_path, world):
    """SIGKILL mid-epoch with SAVE_STEPS, relaunched: same state as uninterrupted, survivors ended."""
    kill = [("saves_complete", {}), ("send", {"number": signal.SIGKILL, "step": 3, "rank": world - 1})]
    job = starter.run("TRAIN.SAVE_STEPS=2", out=tmp_path, world=world, faults=kill)
    assert job.codes[-1] == -signal.SIGKILL
    assert 0 not in job.codes
    job.assert_no_orphans()
    assert max(steps(job.folder)) == 2
    job = starter.run("TRAIN.SAVE_STEPS=2", out=tmp_path, world=world).assert_ok()
    assert "checkpoint_step_000000002.pth" in job.text()
    assert_same_state(job.folder / LAST, reference(world=world))


@SLOW
def test_stop_during_evaluation(starter, reference, tmp_path):
    """SIGTERM while evaluating, continued: the evaluation is repeated, same state as uninterrupted."""
    stop = [("signal_in_evaluation", {"number": signal.SIGTERM, "epoch": 0})]
    job = starter.run(out=tmp_path, world=2, faults=stop).assert_ok("preempted")
    progress = load_checkpoint(job.folder / LAST)["progress"]
    assert (progress["epoch"], progress["samples_seen"], progress["best_epoch"]) == (0, TRAIN_IMAGES, -1)
    assert not (job.folder / "metrics.jsonl").exists()
    job = starter.run(out=tmp_path, world=2).assert_ok()
    assert_same_state(job.folder / LAST, reference(world=2))
    assert figures(job.folder) == figures(reference(world=2).parent)


@SLOW
def test_kill_between_evaluation_and_save(starter, reference, tmp_path):
    """SIGKILL after an epoch is reported and before it is saved: reported once, same state."""
    job = starter.run("TRAIN.SAVE_STEPS=4", out=tmp_path, faults=[("kill_after_report", {"epoch": 1})])
    assert job.codes == [-signal.SIGKILL]
    assert len(figures(job.folder)) == 1
    job = starter.run("TRAIN.SAVE_STEPS=4", out=tmp_path).assert_ok()
    assert_same_state(job.folder / LAST, reference())
    assert figures(job.folder) == figures(reference().parent)


@SLOW
def test_saving_by_the_clock(starter, reference, tmp_path):
    """SAVE_MINUTES saves within the epoch, on all processes at the same update, and changes nothing."""
    slow = [("slow_updates", {"seconds": 0.1})]
    job = starter.run("TRAIN.SAVE_MINUTES=0.005", "TRAIN.SAVE_KEEP=50", out=tmp_path, world=2, faults=slow).assert_ok()
    saved = steps(job.folder)
    assert {6, 12} < set(saved)
    assert_same_state(job.folder / LAST, reference(world=2))
    first = str(step_file(job.folder, saved[0]))
    job = starter.run("--resume", first, "--tag", "again", out=tmp_path, world=2).assert_ok()
    assert_same_state(job.folder / LAST, reference(world=2))


@SLOW
@pytest.mark.parametrize(
    "opts",
    (
        ("DATA.NUM_WORKERS=3", "DATA.LOADER_TIMEOUT=100"),
        ("PRINT_FREQ=1", "SAVE_FREQ=1", "TRAIN.SAVE_STEPS=5", "TRAIN.SAVE_KEEP=4"),
        ("TEST.INTERVAL=2", "TEST.BATCH_SIZE=3"),
        ("DATA.CACHE_DECODED=ram",),
    ),
    ids=" ".join,
)
def test_settings_that_must_not_matter(starter, reference, tmp_path, opts):
    """Workers, log, save and evaluation frequency, caches: same state."""
    job = starter.run(*opts, out=tmp_path).assert_ok()
    # which evaluation was the best depends on how many there were
    assert_same_state(job.folder / LAST, reference(), ignore=("progress",) if "TEST.INTERVAL=2" in opts else ())


@pytest.mark.parametrize(
    ("world", "batch"),
    (
        pytest.param(1, 4, id="1 x 4"),
        pytest.param(1, 12, id="1 x 12", marks=SLOW),
        pytest.param(3, 4, id="3 x 4", marks=SLOW),
        pytest.param(2, 2, id="2 x 2", marks=SLOW),
    ),
)
def test_other_world_or_batch_sees_every_sample_once(starter, tmp_path, world, batch):
    """Stopped at 2 x 4, continued with other processes or batch: every sample once, and the change is logged."""
    record = [("record_samples", {"folder": str(tmp_path)})]
    starter.run(out=tmp_path, world=2, faults=record + stop_at(2)).assert_ok("preempted")
    job = starter.run("--batch-size", str(batch), out=tmp_path, world=world, faults=record).assert_ok()
    for epoch in (0, 1):
        seen = Counter(
            index
            for path in tmp_path.glob("rank*.jsonl")
            for line in path.read_text().splitlines()
            for row in [json.loads(line)]
            if row["epoch"] == epoch
            for index in row["indices"]
        )
        assert seen == Counter(range(TRAIN_IMAGES))
    if world != 2:
        assert f"was saved by 2 process(es), this run has {world}" in job.text()
    if batch != 4:
        assert f"DATA.BATCH_SIZE changes on resume: 4 -> {batch}" in job.text()
    assert [row["epoch"] for row in figures(job.folder)] == [1, 2]


@SLOW
def test_real_processes_and_forks_agree(starter, reference, tmp_path):
    """python main.py in a process of its own, interrupted and continued: same state as the forked reference."""
    starter.launch(out=tmp_path, faults=stop_at(4)).wait().assert_ok("preempted")
    job = starter.launch(out=tmp_path).wait().assert_ok()
    assert_same_state(job.folder / LAST, reference())


def test_a_finished_run_is_not_repeated(starter, reference, tmp_path):
    """The same command after the end: nothing is trained or overwritten."""
    final = reference()
    before = {path.name: path.stat().st_mtime_ns for path in final.parent.glob("*.pth")}
    job = starter.run(out=final.parents[2]).assert_ok()
    assert {path.name: path.stat().st_mtime_ns for path in final.parent.glob("*.pth")} == before
    assert job.folder == run_folder(final.parents[2])
