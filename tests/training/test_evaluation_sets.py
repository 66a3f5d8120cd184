"""The evaluation sets that people ask for, made small in their published formats, and how an evaluation is set."""

import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from inference import load_predictor
from main_eval import main
from tests.tiny_run import TinyRun
from tools.common import run_tool
from tools.corrupt import command
from utils.training import ALEXNET_ERRORS, class_scores, corruption_summary, corruption_table

VAL = "ILSVRC2012_val_{:08d}.JPEG"


@pytest.fixture
def imagenet(tiny: TinyRun, tmp_path: Path) -> Path:
    """The validation set under ImageNet's names, numbered across the classes as there."""
    for number, path in enumerate(sorted((tiny.data / "val").rglob("*.*"), key=lambda path: path.name), 1):
        folder = tmp_path / "imagenet" / "val" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / VAL.format(number))
    return tmp_path / "imagenet"


def opts(**keys: Any) -> list[str]:
    return ["--opts", *(str(word) for name, value in keys.items() for word in (name.replace("__", "."), value))]


def fails(tiny: TinyRun, caplog: pytest.LogCaptureFixture, *words: object) -> str:
    caplog.clear()
    with pytest.raises(SystemExit):
        main(tiny.argv(*words, tag="refused"))
    return caplog.text


# ImageNet-ReaL


def test_real_accuracy_by_hand(tiny, checkpoint, imagenet, tmp_path):
    paths = sorted(imagenet.rglob("*.JPEG"), key=lambda path: path.name)
    predicted = [prediction.indices[0] for prediction in load_predictor(checkpoint)(paths)]
    labels = [[p] if n < 2 else [(p + 1) % 3] if n < 4 else [(p + 1) % 3, p] for n, p in enumerate(predicted)]
    labels[-1], labels[-2] = [], [0, 1, 2]
    file = tmp_path / "real.json"
    file.write_text(json.dumps(labels))
    words = ("--data-path", imagenet, *opts(TEST__REAL_LABELS=file))
    row = tiny.evaluate(checkpoint, *words)
    assert row["real_num_samples"] == 8  # of nine: one has no labels
    assert row["real_acc1"] == 100 * 6 / 8
    assert row["acc1"] == tiny.evaluate(checkpoint, "--data-path", imagenet)["acc1"]
    assert row["test"]["REAL_LABELS"] == str(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([[0]] * 8), "has labels of 8 images, but the data set has 9"),
        (json.dumps([[0]] * 8 + [[3]]), "gives image 9 the class 3, but the data set has classes 0 to 2"),
        (json.dumps([0] * 9), "is not a list with one list of class numbers for each image"),
        (json.dumps([[]] * 9), "has no labels"),
        ("{", "is not JSON"),
    ],
)
def test_label_files_that_cannot_be_used(tiny, checkpoint, imagenet, tmp_path, caplog, text, message):
    (tmp_path / "real.json").write_text(text)
    words = ("--data-path", imagenet, *opts(TEST__REAL_LABELS=tmp_path / "real.json"))
    assert message in fails(tiny, caplog, "--resume", checkpoint, *words)


def test_real_labels_need_imagenets_names_and_order(tiny, checkpoint, imagenet, tmp_path, caplog):
    (tmp_path / "real.json").write_text(json.dumps([[0]] * 9))
    labels = {"TEST__REAL_LABELS": tmp_path / "real.json"}
    text = fails(tiny, caplog, "--resume", checkpoint, *opts(**labels))
    assert "by its name, ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_00000009.JPEG, but the data set has" in text
    (imagenet / "classes.txt").write_text("emu\ncat\ndog\n")
    words = ("--data-path", imagenet, *opts(**labels, DATA__CLASS_ORDER="file"))
    assert "DATA.CLASS_ORDER gives another order" in fails(tiny, caplog, "--resume", checkpoint, *words)
    assert "no file nowhere" in fails(tiny, caplog, "--resume", checkpoint, *opts(TEST__REAL_LABELS="nowhere"))


# ImageNet-V2, -A, -R: classes by number, and a part of the classes


def test_class_folders_named_by_number(tiny, checkpoint, bare, tmp_path, caplog):
    for number, name in enumerate(("cat", "dog", "emu")):
        shutil.copytree(tiny.data / "val" / name, tmp_path / "val" / str(number))
    words = ("--data-path", tmp_path)
    assert "class 0 is 'cat' there and '0' here" in fails(tiny, caplog, "--resume", checkpoint, *words)
    expected = tiny.evaluate(checkpoint)["loss"]
    for file in (checkpoint, bare):
        row = tiny.evaluate(file, *words, *opts(TEST__CLASS_NAMES="numbers"))
        assert row["loss"] == pytest.approx(expected, rel=1e-6)
    assert row["test"]["CLASS_NAMES"] == "numbers"
    shutil.move(tmp_path / "val" / "2", tmp_path / "val" / "10")  # before 1 in the order of text; no such class
    text = fails(tiny, caplog, "--resume", checkpoint, *words, *opts(TEST__CLASS_NAMES="numbers"))
    assert "the data set's classes are not the ones of" in text


def test_a_part_of_the_classes_of_a_file_without_names(tiny, checkpoint, bare, tmp_path, caplog):
    shutil.copytree(tiny.data / "val" / "dog", tmp_path / "val" / "dog")
    shutil.copytree(tiny.data / "val" / "emu", tmp_path / "val" / "emu")
    words, file = ("--data-path", tmp_path), tmp_path / "names.txt"
    assert "set TEST.CLASS_NAMES FILE" in fails(tiny, caplog, "--resume", bare, *words)
    file.write_text("cat\ndog\nemu\n")
    row, named = tiny.evaluate(bare, *words, *opts(TEST__CLASS_NAMES=file)), tiny.evaluate(checkpoint, *words)
    assert (row["loss"], row["acc5"]) == (named["loss"], 100.0)  # the scores of other classes do not count
    file.write_text("cat\ndog\n")
    text = fails(tiny, caplog, "--resume", bare, *words, *opts(TEST__CLASS_NAMES=file))
    assert "lists 2 different names on 2 lines, but the model has 3 classes" in text
    assert "no file nowhere" in fails(tiny, caplog, "--resume", bare, *opts(TEST__CLASS_NAMES="nowhere"))


# ImageNet-C


def test_corruption_folders(tiny, checkpoint, tmp_path, caplog):
    for name in ALEXNET_ERRORS:
        for severity in range(1, 6):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / str(severity)).symlink_to(tiny.data / "val")
    fog = tmp_path / "fog" / "3"
    fog.unlink()
    shutil.copytree(tiny.data / "val" / "dog", fog / "dog")  # one class of the three: the only score
    words = opts(TEST__CORRUPTIONS=tmp_path, TEST__BATCH_SIZE=16)
    with caplog.at_level(logging.INFO):
        row = tiny.evaluate(checkpoint, *words)
    clean = 100 - tiny.evaluate(checkpoint)["acc1"]
    assert row["corruptions"]["snow"]["errors"] == [clean] * 5
    assert row["corruptions"]["fog"]["errors"] == [clean, clean, 0.0, clean, clean]
    assert row["mean_error"] == pytest.approx(clean * 74 / 75)
    assert row["mce"] is None  # AlexNet's errors are for 1000 classes
    assert row["num_samples"] == 74 * 9 + 3
    assert "jpeg_compression" in caplog.text
    shutil.rmtree(fog)
    message = "lacks 1 of the 75 folders CORRUPTION/SEVERITY: fog/3"
    assert message in fails(tiny, caplog, "--resume", checkpoint, *words)


def test_corruptions_are_written_once_and_alike(tiny, checkpoint, tmp_path, monkeypatch, capsys):
    def corrupt(image, severity, corruption_name, **seed):
        assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
        assert bool(seed) == (corruption_name == "glass_blur")
        return np.full(image.shape, np.random.uniform(0, 255))  # float, as some corruptions return it

    arguments = [str(checkpoint), "--data-path", str(tiny.data), "--output", str(tmp_path / "c")]
    arguments += ["--opts", "DATA.IMG_SIZE=64", "DATA.DATASET=folder"]
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert run_tool(command, arguments) == 2
    assert "pip install imagecorruptions-imaug" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "imagecorruptions", SimpleNamespace(corrupt=corrupt))
    monkeypatch.setattr("tools.corrupt.usable_cores", lambda: 0)
    data = tmp_path / "data"
    shutil.copytree(tiny.data / "val" / "dog", data / "val" / "dog")
    for path in sorted((data / "val" / "dog").iterdir())[1:]:
        path.unlink()
    arguments[2] = str(data)
    assert command(arguments) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*.jpg")}
    assert len(files) == 75
    assert len(set(files.values())) > 50
    again = tmp_path / "c" / "snow" / "2" / "dog" / "00000000.jpg"
    again.unlink()
    assert command(arguments) == 0
    assert "1 new files" in capsys.readouterr().out
    assert again.read_bytes() == files[again]


def test_corruption_errors_relative_to_alexnet():
    same = corruption_summary({name: [100 * e] * 5 for name, e in ALEXNET_ERRORS.items()}, normalise=True)
    assert same["mce"] == pytest.approx(100.0)
    assert same["mean_error"] == pytest.approx(79.0, abs=0.2)
    errors = {name: [0.0] * 5 for name in ALEXNET_ERRORS} | {"snow": [10.0, 20.0, 30.0, 40.0, 50.0]}
    summary = corruption_summary(errors, normalise=True)
    assert summary["corruptions"]["snow"]["ce"] == pytest.approx(30 / 0.866816)
    assert summary["mce"] == pytest.approx(30 / 0.866816 / 15)
    shown = corruption_table(summary).splitlines()[8].split()
    assert shown == ["snow", "10.00", "20.00", "30.00", "40.00", "50.00", "30.00", "34.61"]


# the centre crop and mirror images


def test_crop_ratio_is_stored_and_compared(tiny, checkpoint, tmp_path, caplog):
    size = {"DATA__IMG_SIZE": 64, "DATA__VAL_CACHE": tmp_path}
    usual = tiny.evaluate(checkpoint, *opts(**size))
    assert usual["preprocessing"]["short_side"] == 73
    with caplog.at_level(logging.WARNING):
        row = tiny.evaluate(checkpoint, *opts(**size, TEST__CROP_RATIO=1.0))
    assert (row["preprocessing"]["short_side"], row["preprocessing"]["crop"]) == (64, True)
    assert row["loss"] != usual["loss"]
    assert len(list(tmp_path.glob("val_*.npy"))) == 2  # a cache of its own
    assert "preprocessing short_side" in caplog.text


def test_flip_is_the_mean_of_the_probabilities(tiny, checkpoint):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    images = torch.randn(4, 3, 4, 4)
    mean = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
    scores = class_scores(model, images, autocast=torch.inference_mode, flip=True)
    torch.testing.assert_close(scores.exp(), mean)
    part = class_scores(model, images, autocast=torch.inference_mode, columns=[4, 0], flip=True)
    chosen = [model(each)[:, [4, 0]].softmax(1) for each in (images, images.flip(3))]
    torch.testing.assert_close(part.exp(), sum(chosen) / 2)
    far = class_scores(lambda x: x.flatten(1) * 1e4, images, autocast=torch.inference_mode, flip=True)
    assert torch.isfinite(far).all()  # probabilities that are 0 in float32

    flipped = tiny.evaluate(checkpoint, *opts(TEST__FLIP=True))
    assert flipped["loss"] != tiny.evaluate(checkpoint)["loss"]
    assert flipped["test"]["FLIP"] is True
    predict = load_predictor(checkpoint, opts=["TEST.FLIP=True"])
    paths = sorted((tiny.data / "val").rglob("*.*"))
    hits = sum(prediction.names[0] == path.parent.name for prediction, path in zip(predict(paths), paths, strict=True))
    assert flipped["acc1"] == pytest.approx(100 * hits / len(paths))


def test_training_validates_with_mirror_images(tiny):
    folder = tiny.train("--epochs", 1, *opts(TEST__FLIP=True), tag="flip")
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert tiny.evaluate(folder / "checkpoint_last.pth")["loss"] != pytest.approx(row["val_loss"], abs=1e-9)
    again = tiny.evaluate(folder / "checkpoint_last.pth", *opts(TEST__FLIP=True))
    assert again["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
