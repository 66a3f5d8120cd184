"""tools/preflight.py: what would stop a run is found before it starts, with its remedy, and nothing is written."""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny_run import TinyRun
from tools import preflight
from tools.dry_run import forecast
from utils.checkpoint.room import planned_files
from utils.config import load_config


@pytest.fixture
def tiny(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path)


@pytest.fixture
def check(tiny: TinyRun, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Return a function that runs preflight with further words, and returns exit status and output."""

    def run(*words: object, seconds: float = 0) -> tuple[int, str]:
        status = preflight.main(tiny.argv("--seconds", seconds, *words))
        return status, capsys.readouterr().out

    return run


def test_a_good_run_is_measured_and_leaves_no_trace(tiny, check):
    before = {path: path.stat().st_mtime_ns for path in tiny.folder.rglob("*")}
    status, text = check("--pretend-world", 2, "--json", seconds=0.05)
    found = json.loads(text)
    assert (status, found["fails"]) == (0, False), text
    figures = found["figures"]
    assert figures["data"] == {"classes": 3, "training": 24, "validation": 9}
    assert figures["recipe"]["images_per_update"] == 8
    assert figures["recipe"]["updates"] == 2 * (24 // 8)
    assert figures["recipe"]["images_seen"] == 48
    speeds = figures["images_per_second"]
    assert min(speeds.values()) > 0
    assert figures["evaluation"]["times"] == 2
    parts = figures["seconds"]
    assert parts["update"] == pytest.approx(4 / speeds["training"])
    assert parts["evaluation"] == pytest.approx(9 / (2 * speeds["evaluation"]))
    assert min(parts.values()) > 0
    seconds = 6 * parts["update"] + 2 * (parts["epoch"] + parts["evaluation"] + parts["save"])
    assert figures["predicted"]["hours"] == pytest.approx(seconds / 3600)
    assert figures["peak_memory_bytes"] > 0
    assert {path: path.stat().st_mtime_ns for path in tiny.folder.rglob("*")} == before


def test_a_time_budget_says_how_many_updates_fit(tiny, check):
    status, text = check("--time-budget", "1h", "--json", seconds=0.05)
    figures = json.loads(text)["figures"]
    assert status == 0, text
    assert figures["recipe"]["updates"] > 100
    assert figures["recipe"]["epochs"] == math.ceil(figures["recipe"]["updates"] / 6)
    assert 0.8 < figures["predicted"]["hours"] <= 0.98
    assert figures["disk"]["checkpoints"] == planned_files(load_config(tiny.cfg), figures["recipe"]["epochs"])
    status, text = check("--time-budget", "0.01s", seconds=0.05)
    assert status == 1
    assert "FAILS  time budget: TRAIN.TIME_BUDGET is 0.01s, of which 0 s are left" in text
    assert "finish" not in text


def test_each_process_takes_its_share_of_the_images_of_an_update(check, monkeypatch):
    batches, original = [], forecast.rehearse

    def rehearse(model, state, session, **options):
        batches.append((session.config.DATA.BATCH_SIZE, session.config.TRAIN.GLOBAL_BATCH))
        return original(model, state, session, **options)

    monkeypatch.setattr(forecast, "rehearse", rehearse)
    status, text = check("--global-batch", 8, "--pretend-world", 2, "--json", seconds=0.01)
    figures = json.loads(text)["figures"]
    assert (status, batches) == (0, [(4, 8)]), text
    assert figures["images_per_second"]["training"] == pytest.approx(4 / figures["seconds"]["update"])


def test_the_length_may_be_given_as_updates(check):
    status, text = check("--opts", "TRAIN.UPDATES=20", "--json")
    figures = json.loads(text)["figures"]
    assert status == 0, text
    assert (figures["recipe"]["epochs"], figures["recipe"]["images_seen"]) == (4, 80)
    assert figures["disk"]["checkpoints"] == 4


def test_a_timm_model_is_measured(check):
    words = ("MODEL.TYPE=timm", "MODEL.TIMM_NAME=test_resnet")
    status, text = check("--opts", *words, seconds=0.05)
    assert status == 0, text
    assert "computing alone" in text
    assert "the run can start" in text


def a_class_only_in_val(tiny: TinyRun) -> tuple[str, ...]:
    shutil.rmtree(tiny.data / "train" / "emu")
    return ()


def no_val(tiny: TinyRun) -> tuple[str, ...]:
    shutil.rmtree(tiny.data / "val")
    return ()


def a_damaged_image(tiny: TinyRun) -> tuple[str, ...]:
    (tiny.data / "train" / "dog" / "1.jpg").write_bytes(b"<html>")
    return ()


@pytest.mark.parametrize(
    ("prepare", "problem", "remedy"),
    [
        (a_class_only_in_val, "only in val: 'emu'", "train needs images of each class of val"),
        (no_val, "val, which is not there", "DATA.HOLDOUT 0.2"),
        (a_damaged_image, "dog/1.jpg (not an image", "replace or remove them, or train without them"),
        (lambda _: ("--batch-size", 5), "DATA.BATCH_SIZE is 5, but mixup and cutmix pair", "take an even size"),
        (lambda _: ("--batch-size", 26), "DATA.BATCH_SIZE 26 is larger than the 24", "take at most 24"),
        (lambda _: ("--pretend-world", 8), "all 8 processes takes 32 images", "fewer processes"),
        (lambda _: ("--opts", "MODEL.NUM_CLASSES=7"), "MODEL.NUM_CLASSES is 7", "set MODEL.NUM_CLASSES 3"),
        (lambda _: ("--opts", "DATA.BATCH_SIZ=2"), "unknown key DATA.BATCH_SIZ", "did you mean DATA.BATCH_SIZE"),
        (lambda _: ("--pretrained", "/nowhere.pth"), "/nowhere.pth", ""),
    ],
)
def test_each_bad_run_is_found_with_its_remedy(tiny, check, prepare, problem, remedy):
    words = prepare(tiny)
    status, text = check(*words, seconds=0.01 if "--pretrained" in words else 0)
    assert status == 1
    lines = [line for line in text.splitlines() if problem in line and remedy in line]
    assert len(lines) > 0, text
    assert lines[0].startswith("FAILS  "), text
    assert not tiny.output.exists()


@pytest.mark.parametrize(("free", "problem"), [(1000, "a checkpoint takes about"), (10**6, "checkpoints of the run")])
def test_a_disk_that_is_too_small(check, monkeypatch, free, problem):
    monkeypatch.setattr("utils.checkpoint.room.free_bytes", lambda _: free)
    status, text = check()
    assert status == 1
    assert problem in text
    assert "choose another place with --output" in text


def test_main_warns_where_not_all_checkpoints_fit(tiny, monkeypatch, capsys):
    monkeypatch.setattr("utils.checkpoint.room.free_bytes", lambda _: 10**6)
    tiny.train("--epochs", 20, "--opts", "TRAIN.UPDATES", 12)  # which are 2 epochs
    assert "the 2 checkpoints of the run" in capsys.readouterr().out


def test_one_error_does_not_hide_another(tiny, check):
    a_damaged_image(tiny)
    no_val(tiny)
    status, text = check("--batch-size", 5, "--opts", "AUG.COLOR_JITTER=-1", "MODEL.NUM_CLASSES=7")
    assert status == 1
    for problem in ("pair the images", "AUG.COLOR_JITTER is -1", "not there", "dog/1.jpg", "NUM_CLASSES is 7"):
        assert problem in text
    assert "not measured" in text


def test_what_does_not_stop_the_run_is_a_warning(tiny, check):
    shutil.rmtree(tiny.data / "val" / "emu")
    a_damaged_image(tiny)
    status, text = check("--opts", "DATA.BAD_IMAGES=skip", "TRAIN.EPOCHS=200")
    assert status == 0
    for warning in ("1 class has no images", "dog/1.jpg", "this recipe is made for far more than 24 images"):
        assert any(warning in line for line in text.splitlines() if line.startswith("warning  ")), text


def test_a_logger_that_is_not_installed(check, monkeypatch):
    installed = importlib.util.find_spec
    monkeypatch.setattr("tools.dry_run.checks.find_spec", lambda name: None if name == "wandb" else installed(name))
    status, text = check("--opts", "LOGGER=wandb")
    assert (status, "LOGGER wandb will be off: wandb cannot be imported; pip install" in text) == (0, True), text


def test_a_run_that_goes_on(tiny, check, capsys):
    folder = tiny.train("--epochs", 2)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, text = check("--json", seconds=0.01)
    assert (status, json.loads(text)["figures"]["evaluation"]["times"]) == (0, 0)  # nothing is left to do
    status, text = check("--opts", "TRAIN.BASE_LR=0.1", seconds=0.01)
    assert status == 1
    assert "TRAIN.BASE_LR: 0.001 in the checkpoint, 0.1 now" in text
    assert "BAD_IMAGES" not in text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ("TRAIN.EPOCHS=300 SAVE_FREQ=20 TRAIN.SAVE_KEEP=2", 15 + 2 + 1),
        ("TRAIN.EPOCHS=300 SAVE_FREQ=1", 300),
        ("TRAIN.EPOCHS=1 TRAIN.WARMUP_EPOCHS=0", 1),
        ("TRAIN.EPOCHS=30 SAVE_FREQ=10 TRAIN.SAVE_STEPS=5", 3 + 2 + 1),
    ],
)
def test_planned_files(tiny, words, files):
    config = load_config(tiny.cfg, words.split())
    assert planned_files(config, config.TRAIN.EPOCHS) == files


def test_wrong_usage_is_status_2(tiny, monkeypatch, capsys):
    assert preflight.run_tool(preflight.main, tiny.argv("--throughput")) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert preflight.run_tool(preflight.main, tiny.argv()) == 2
    assert "leave out torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0, 0.01])
def test_a_starting_point_that_cannot_be_used(tiny, check, tmp_path, seconds):
    other = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(3)}, other)
    for path, problem in ((other, "does not fit the model"), (tmp_path / "none.pth", "does not exist")):
        status, text = check("--pretrained", path, seconds=seconds)
        assert status == 1
        assert "starting point: " in text
        assert problem in text
