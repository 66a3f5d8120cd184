"""A checkpoint alone is enough to use it, however it was trained; what only training reads is not asked for."""

import csv
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import main
import main_eval
from inference import open_checkpoint
from tests.builders import config_with, model_config
from tests.images import write_folder
from tests.tiny_run import TinyRun
from tools import export, predict, report, show_batch
from tools.common import run_tool
from utils.config import load_stored_config, trains
from utils.config.checks import check_config
from utils.training.pictures import draw_batch

pytestmark = pytest.mark.usefixtures("no_drawing")
OWN = ("MODEL.NUM_CLASSES", 0, "DATA.HOLDOUT", 0.25)


def csv_of_frozen_student(tiny: TinyRun, folder: Path, checkpoint: Path) -> list[object]:
    """Return the words of a run on a CSV file: held-out images, frozen stages, a teacher that is then gone."""
    write_folder(folder / "images", ("cat", "dog", "emu"), 6)
    with open(folder / "list.csv", "w", encoding="utf-8-sig", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(("label", "path"))
        rows.writerows((p.parent.name, p.relative_to(folder)) for p in sorted((folder / "images").rglob("*.jpg")))
    teacher = shutil.copy(checkpoint, folder / "teacher.pth")
    words = ["--data-path", folder / "list.csv", "--dataset", "csv", "--opts", *OWN, "TRAIN.FREEZE", "head_only"]
    return [*words, "TRAIN.DISTILL.KIND", "soft", "TRAIN.DISTILL.TEACHER", teacher, "TRAIN.EMA_DECAY", 0.5]


def tiffs_of_five_channels(tiny: TinyRun, folder: Path, checkpoint: Path) -> list[object]:
    random = np.random.default_rng(0)
    for number in range(12):
        pages = [Image.fromarray(random.integers(0, 256, (40, 50), dtype=np.uint8)) for _ in range(5)]
        path = folder / "images" / ("cat", "dog")[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        pages[0].save(path, save_all=True, append_images=pages[1:])
    return ["--data-path", folder / "images", "--dataset", "folder", "--opts", *OWN, "MODEL.STRIP_MLP.IN_CHANS", 5]


def grey_rectangles(tiny: TinyRun, folder: Path, checkpoint: Path) -> list[object]:
    words = ["--opts", "MODEL.STRIP_MLP.IN_CHANS", 1, "DATA.IMG_SIZE", "32,64", "DATA.FAST_RESIZE", True]
    return [*words, "DATA.VAL_CACHE", folder / "cache", "DATA.MEAN", 0.4, "DATA.STD", 0.2]


def timm_with_layer_decay(tiny: TinyRun, folder: Path, checkpoint: Path) -> list[object]:
    words = ["--opts", "MODEL.TYPE", "timm", "MODEL.TIMM_NAME", "test_resnet", "MODEL.NUM_CLASSES", 0]
    return [*words, "TRAIN.LAYER_DECAY", 0.8, "TRAIN.FREEZE", "stages1"]


@pytest.mark.parametrize(
    "kind", (csv_of_frozen_student, tiffs_of_five_channels, grey_rectangles, timm_with_layer_decay)
)
def test_a_checkpoint_alone_is_enough(
    tiny: TinyRun, checkpoint: Path, tmp_path: Path, kind: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    words = kind(tiny, tmp_path, checkpoint)
    folder = tiny.train(*words, "TRAIN.EPOCHS", 1, tag=kind.__name__)
    assert "batch.png could not be written" not in caplog.text
    (tmp_path / "teacher.pth").unlink(missing_ok=True)
    file = folder / "checkpoint_last.pth"
    data = words[1] if words[0] == "--data-path" else tiny.data
    main_eval.main([str(word) for word in (file, "--data-path", data, "--output", tmp_path / "eval")])
    result = json.loads(next((tmp_path / "eval").rglob("eval.json")).read_text())
    logged = json.loads((folder / "metrics.jsonl").read_text())
    assert (result["num_samples"], result["acc1"]) == (logged["val_samples"], logged["val_acc1"])

    picture_path = next(path for path in Path(data if Path(data).is_dir() else tmp_path).rglob("*.*[fg]"))
    for command, more in (
        (predict.command, [picture_path]),
        (report.command, ["--data-path", data]),
        (show_batch.command, ["--data-path", data, "--output", tmp_path / "batch.png"]),
        (export.command, ["--format", "safetensors", "--output", tmp_path / "exported"]),
    ):
        assert run_tool(command, [str(word) for word in (file, *more)]) == 0, command
    opened = open_checkpoint(file, device="cpu")
    again = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
    images = torch.randn(1, *opened_shape(opened))
    torch.testing.assert_close(again(images), opened.model(images))
    assert opened.config.MODEL.NUM_CLASSES == len(opened.classes) == again.num_classes


def opened_shape(opened) -> tuple[int, ...]:
    size = opened.preprocessing["img_size"]
    return opened.config.MODEL.STRIP_MLP.IN_CHANS, *(size if isinstance(size, list) else (size, size))


def test_what_was_frozen_in_training_is_not_when_opened(tiny: TinyRun) -> None:
    file = tiny.train("--epochs", 1, "--opts", "TRAIN.FREEZE", "head_only", tag="frozen") / "checkpoint_last.pth"
    model = open_checkpoint(file, device="cpu").model
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.train().modules())


def test_a_frozen_network_can_be_pickled() -> None:
    from models import build_model

    config = model_config()
    config.TRAIN.FREEZE = "head_only"
    copied = pickle.loads(pickle.dumps(build_model(config)))  # noqa: S301 our own
    assert copied.train().head.training
    assert not copied.norm.training


def test_evaluation_takes_what_only_training_reads_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    text = "TRAIN: {EPOCHS: 0, OPTIMIZER: {NAME: adafactor3}, DISTILL: {KIND: soft}, NEW_KEY: 3}\n"
    text += "AUG: {AUTO_AUGMENT: nonsense, MIXUP_OFF_EPOCHS: 9}\nDATA: {INTERPOLATION: lanczos}\n"
    config, _ = load_stored_config(text, "a.pth", overrides={"EVAL_MODE": True})
    assert config.DATA.INTERPOLATION == "lanczos"
    assert config.TRAIN.OPTIMIZER.NAME == "adamw"
    assert "a.pth was trained with settings unknown here" in caplog.text
    assert "TRAIN.NEW_KEY" in caplog.text
    with pytest.raises(ValueError, match=r"(?s)adafactor3.*TRAIN.NEW_KEY.*TRAIN.EPOCHS is 0"):
        load_stored_config(text, "a.pth")
    with pytest.raises(ValueError, match="unknown key MODEL.NEW_KEY"):  # it may change the model
        load_stored_config("MODEL: {NEW_KEY: 3}", "a.pth", overrides={"EVAL_MODE": True})


@pytest.mark.parametrize("mode", ("EVAL_MODE", "THROUGHPUT_MODE"))
def test_the_recipe_is_checked_for_training_alone(mode: str) -> None:
    config = config_with(
        TRAIN__EPOCHS=5,
        TRAIN__CLASS_WEIGHTS="balanced",
        DATA__SAMPLER="balanced",
        TRAIN__DISTILL__KIND="hard",
        DATA__BATCH_SIZE=33,
        DATA__INTERPOLATION="lanczos",
    )
    assert len(check_config(config)) == 5
    config[mode] = True
    assert not trains(config)
    assert check_config(config) == []


def test_the_throughput_of_a_student_needs_no_teacher(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_eval, "measure_throughput", lambda *_, **__: 1.0)
    main.main(tiny.argv("--throughput", "--opts", "TRAIN.DISTILL.KIND", "soft", tag="throughput"))


@pytest.mark.parametrize("channels", (1, 2, 4))
def test_batches_of_any_channels_are_drawn(channels: int) -> None:
    """In grey up to two channels, else by the first three; normalised back with the statistics of the run."""
    images = torch.zeros(1, channels, 32, 64)
    sheet = draw_batch(images, torch.tensor([0]), ["cat"], mean=[0.2] * channels, std=[1.0] * channels)
    assert sheet.getpixel((40, 40)) == (51, 51, 51)


def test_starting_from_weights_that_held_out_other_images_is_warned_about(
    tiny: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "data", ("cat", "dog"), 8)
    words = ("--data-path", tmp_path / "data", "--epochs", 1, "--opts", *OWN)
    file = tiny.train(*words, tag="seed0") / "checkpoint_last.pth"
    tiny.train("--pretrained", file, *words, tag="same")
    assert "held out other images" not in caplog.text
    with caplog.at_level(logging.WARNING):
        tiny.train("--pretrained", file, "--seed", 1, *words, tag="seed1")
    assert "held out other images: if they come from the same data, it was trained on some" in caplog.text
