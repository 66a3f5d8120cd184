"""Which checkpoint a restart takes, and what it says about those that it does not take."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.faults.harness import BEST, LAST, assert_same_state, run_folder, state_hash, step_file, steps
from utils.checkpoint.files import load_checkpoint

SLOW = pytest.mark.faults
STEPS = ("TRAIN.SAVE_STEPS=4",)


@pytest.fixture(scope="module")
def stopped(starter, tmp_path_factory) -> Path:
    """Output folder of a run stopped after 10 updates, with files of updates 8 and 10."""
    out = tmp_path_factory.mktemp("stopped")
    stop = [("send", {"number": signal.SIGTERM, "step": 9})]
    job = starter.run(*STEPS, out=out, faults=stop).assert_ok("preempted")
    assert steps(job.folder) == [8, 10]
    return out


@pytest.fixture
def out(stopped, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(stopped, tmp_path / "out")
    folder = run_folder(tmp_path / "out")
    os.unlink(folder / LAST)
    os.link(step_file(folder, 10), folder / LAST)  # one file of two names, as the run left it
    return tmp_path / "out"


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of the file: in a tensor."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


DAMAGES = {
    "bit flipped": (flip_bit, "the checksum of its member"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "truncated or damaged"),
    "zero bytes": (lambda path: os.truncate(path, 0), "is empty (0 bytes)"),
    "filled with zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "not a PyTorch checkpoint"),
    "other file": (lambda path: torch.save({"model": {}}, path), "has no training state"),
}


@pytest.mark.parametrize("name", ("bit flipped", *(pytest.param(n, marks=SLOW) for n in list(DAMAGES)[1:])))
def test_damaged_newest_file(starter, reference, out, name):
    """Newest checkpoint damaged: warned with file and reason, previous one taken, same state at the end."""
    damage, reason = DAMAGES[name]
    newest = step_file(run_folder(out), 10)
    damage(newest)
    job = starter.run(*STEPS, out=out).assert_ok()
    assert f"passed over: {newest}" in job.text()
    assert reason in job.text()
    assert f"resumed from {step_file(job.folder, 8)}" in job.text()
    assert newest.with_name(newest.name + ".aside").exists()
    assert_same_state(job.folder / LAST, reference())


@pytest.mark.parametrize("world", (1, pytest.param(2, marks=SLOW)))
def test_only_damaged_files(starter, out, world):
    """All checkpoints damaged: an error names each, nothing is written, nothing starts from zero."""
    folder = run_folder(out)
    files = sorted(folder.glob("*.pth"))
    for path in files:
        os.truncate(path, 1000)
    job = starter.run(*STEPS, out=out, world=world)
    job.assert_failed("no checkpoint in", "starting from zero would hide that", *map(str, files))
    assert sorted(folder.glob("*.pth*")) == files
    assert "starting from scratch" not in job.text()


@SLOW
@pytest.mark.parametrize("kind", ("damaged", "missing", "a folder"))
def test_explicit_path_never_falls_back(starter, out, tmp_path, kind):
    """--resume with a bad file: an error that names it, although the folder has good ones."""
    path = tmp_path / "wanted.pth"
    if kind == "damaged":
        shutil.copy(step_file(run_folder(out), 10), path)
        flip_bit(path)
    elif kind == "a folder":
        path.mkdir()
    before = {p.name: state_hash(p) for p in run_folder(out).glob("*.pth")}
    for program in ("main", "main_eval"):
        job = starter.run("--resume", str(path), out=out, program=program)
        reason = "the checksum of its member" if kind == "damaged" else "does not exist or is not a file"
        job.assert_failed(str(path), reason)
        assert "Traceback" not in job.text()
    assert {p.name: state_hash(p) for p in run_folder(out).glob("*.pth")} == before


@SLOW
def test_explicit_older_file_wins(starter, reference, out):
    """--resume of an older file, interrupted again: later files stand aside, the run goes on from there."""
    folder = run_folder(out)
    stop = [("send", {"number": signal.SIGTERM, "step": 8})]
    job = starter.run("--resume", str(step_file(folder, 8)), out=out, faults=stop).assert_ok("preempted")
    assert f"resumed from {step_file(folder, 8)}" in job.text()
    assert f"Continue with --resume {step_file(folder, 9)}" in job.text()
    assert steps(folder) == [8, 9]
    assert step_file(folder, 10).with_name("checkpoint_step_000000010.pth.aside").exists()
    job = starter.run(out=out).assert_ok()
    assert f"resumed from {step_file(folder, 9)}" in job.text()
    assert_same_state(folder / LAST, reference())


@SLOW
def test_number_counts_not_the_time(starter, reference, out):
    """Times of change shuffled, stray files about: the file with the highest step is taken."""
    folder = run_folder(out)
    for path, age in ((step_file(folder, 10), 90_000), (step_file(folder, 8), -90_000)):
        moment = path.stat().st_mtime - age
        os.utime(path, (moment, moment))
    (folder / "notes_pth").write_text("x")
    (folder / "model.pth").write_text("x")
    job = starter.run(*STEPS, out=out).assert_ok()
    assert f"resumed from {step_file(folder, 10)}" in job.text()
    assert_same_state(folder / LAST, reference())


@SLOW
def test_start_over_in_a_used_folder(starter, reference, out):
    """AUTO_RESUME False in a used folder: from scratch, and what an interruption continues is the new run."""
    stop = [("send", {"number": signal.SIGTERM, "step": 2})]
    job = starter.run("TRAIN.AUTO_RESUME=False", out=out, faults=stop).assert_ok("preempted")
    assert "starting from scratch" in job.text()
    assert steps(job.folder) == [3]
    job = starter.run(out=out).assert_ok()
    assert f"resumed from {step_file(job.folder, 3)}" in job.text()
    assert_same_state(job.folder / LAST, reference())


@SLOW
def test_evaluation_takes_the_named_file_only(starter, out):
    """main_eval: without --resume an error, with it that file, whatever newer ones there are."""
    starter.run(out=out, program="main_eval").assert_failed("no checkpoint to evaluate: name one with --resume")
    job = starter.run("--resume", str(step_file(run_folder(out), 8)), out=out, program="main_eval")
    assert job.codes == [0], job.text()
    assert f"{step_file(run_folder(out), 8)}: top-1" in job.text()


@SLOW
@pytest.mark.parametrize(
    ("opts", "key", "values"),
    (
        (("TRAIN.BASE_LR=1e-3",), "TRAIN.BASE_LR", ("0.002", "0.001")),
        (("--epochs", "3"), "TRAIN.EPOCHS", ("2", "3")),
        (("--seed", "5"), "SEED", ("0", "5")),
        (("TRAIN.WEIGHT_DECAY=0.3",), "TRAIN.WEIGHT_DECAY", ("0.05", "0.3")),
    ),
    ids=("rate", "epochs", "seed", "decay"),
)
def test_other_recipe_needs_permission(starter, out, opts, key, values):
    """Changed setting on resume: an error with both values; with --allow-change it is logged and takes effect."""
    folder = run_folder(out)
    job = starter.run(*opts, out=out)
    then, now = values
    job.assert_failed(f"{key}: {then} in the checkpoint, {now} now (allow with --allow-change {key})")
    assert steps(folder) == [8, 10]
    job = starter.run(*opts, "--allow-change", key, out=out).assert_ok()
    assert f"{key} changes on resume: {then} -> {now}" in job.text()
    last = load_checkpoint(folder / LAST)
    assert last["optimizer"]["param_groups"][0]["weight_decay"] == (0.3 if key == "TRAIN.WEIGHT_DECAY" else 0.05)
    assert last["progress"]["epoch"] == (3 if key == "TRAIN.EPOCHS" else 2)


@SLOW
@pytest.mark.parametrize(
    ("opts", "message"),
    (
        (("MODEL.STRIP_MLP.EMBED_DIM=16",), "MODEL.STRIP_MLP.EMBED_DIM: 8 in the checkpoint, 16 now"),
        (("MODEL.STRIP_MLP.EMBED_DIM=16", "--allow-change", "MODEL.STRIP_MLP.EMBED_DIM"), "belongs to another model"),
        (("TRAIN.OPTIMIZER.NAME=sgd", "--allow-change", "TRAIN.OPTIMIZER.NAME"), "another optimizer"),
        (("TRAIN.EMA_DECAY=0.0", "--allow-change", "TRAIN.EMA_DECAY"), "was saved with averaged weights"),
        (("--allow-change", "TRAIN.BASE_RL"), "TRAIN.BASE_LR"),
    ),
    ids=("model", "model, allowed", "optimizer, allowed", "average, allowed", "mistyped key"),
)
def test_changes_that_cannot_be(starter, out, opts, message):
    """Another model, optimizer or average on resume: refused even if allowed, nothing written."""
    before = {path.name: path.read_bytes() for path in run_folder(out).glob("*.pth*")}
    starter.run(*opts, out=out).assert_failed(message)
    assert {path.name: path.read_bytes() for path in run_folder(out).glob("*.pth*")} == before


@SLOW
def test_other_classes(starter, out, tmp_path):
    """The data set's classes differ from the checkpoint's: refused, naming the first difference."""
    images = tmp_path / "images"
    shutil.copytree(starter.folder / "images", images)
    for part in ("train", "val"):
        (images / part / "b").rename(images / part / "bb")
    job = starter.run("--data-path", str(images), out=out)
    job.assert_failed("class 1 is 'b' there and 'bb' here")


@SLOW
def test_other_number_of_samples(starter, out, tmp_path):
    """Images were added since: logged, and the run goes on."""
    images = tmp_path / "images"
    shutil.copytree(starter.folder / "images", images)
    shutil.copy(images / "train" / "a" / "000.png", images / "train" / "a" / "100.png")
    job = starter.run("--data-path", str(images), out=out).assert_ok()
    assert "was trained on 48 images, this data set has 49" in job.text()
    assert "twice or not at all" in job.text()


@SLOW
@pytest.mark.parametrize("version", (0, 2, "1"))
def test_other_format_version(starter, out, version):
    """A file of a newer or no known format: refused by its version, never half read."""
    path = step_file(run_folder(out), 10)
    torch.save({**load_checkpoint(path), "format_version": version, "config": "SOMETHING: new"}, path)
    job = starter.run("--resume", str(path), out=out)
    job.assert_failed(str(path), "this code reads up to 1" if version == 2 else "was not written by this project")


@SLOW
def test_fine_tuning_from_a_checkpoint(starter, out, tmp_path):
    """--pretrained in a new folder starts at update 0 with the weights; with a started run there, that goes on."""
    source = str(run_folder(out) / BEST) if (run_folder(out) / BEST).exists() else str(step_file(run_folder(out), 10))
    stop = [("send", {"number": signal.SIGTERM, "step": 0})]
    job = starter.run("--pretrained", source, out=tmp_path / "new", faults=stop).assert_ok("preempted")
    assert f"weights from {source}" in job.text()
    assert load_checkpoint(job.folder / LAST)["progress"]["global_step"] == 1
    job = starter.run("--pretrained", source, out=tmp_path / "new", faults=stop).assert_ok()
    assert f"--pretrained {source} is not read" in job.text()
    assert "resumed from" in job.text()
