"""Runs on data without a validation set, of unknown and unequal classes."""

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import main_eval
from tests.builders import config_with
from tests.images import picture, write_folder
from tests.tiny_run import TinyRun
from tools.replay import Replay
from utils.checkpoint.files import load_checkpoint
from utils.config import short_of_updates
from utils.training.evaluation import evaluate
from utils.training.losses import build_criterion, class_weights

LABELS = np.repeat([0, 1, 2], (6, 3, 1))
OWN = ("--opts", "MODEL.NUM_CLASSES", 0, "DATA.HOLDOUT", 0.25)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run on class folders alone: 16 images of cats, 8 of dogs."""
    tiny = TinyRun(tmp_path_factory.mktemp("own"))
    shutil.rmtree(tiny.data)
    write_folder(tiny.data, ("cat", "dog"), 8)
    for number in range(8, 16):
        picture(number).save(tiny.data / "cat" / f"{number}.jpg")
    return tiny


@pytest.fixture(scope="module")
def trained(tiny: TinyRun) -> Path:
    return tiny.train("--epochs", 1, *OWN)


def test_head_log_and_results_follow_the_data(tiny: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        folder = tiny.train("--epochs", 1, *OWN, tag="log")
    assert "18 training and 6 validation samples in 2 classes (MODEL.NUM_CLASSES 0" in caplog.text
    assert "training images of each class: cat 12, dog 6" in caplog.text
    payload = load_checkpoint(folder / "checkpoint_last.pth")
    assert payload["model"]["head.weight"].shape[0] == 2
    assert len(json.loads((folder / "holdout.json").read_text())["images"]) == 6


def test_evaluation_rebuilds_the_head_and_the_held_out_part(tiny: TinyRun, trained: Path) -> None:
    row = json.loads((trained / "metrics.jsonl").read_text())
    result = tiny.evaluate(trained / "checkpoint_last.pth", *OWN)
    assert result["num_samples"] == 6
    assert (result["acc1"], result["balanced_acc1"]) == (row["val_acc1"], row["val_balanced_acc1"])
    assert tiny.evaluate(trained / "checkpoint_last.pth", *OWN, "--seed", 9)["acc1"] == row["val_acc1"]


def test_other_held_out_images_are_refused(tiny: TinyRun, trained: Path, tmp_path: Path, caplog) -> None:
    shutil.copy(trained / "checkpoint_last.pth", tmp_path / "moved.pth")
    tiny.evaluate(tmp_path / "moved.pth", *OWN)  # the same seed divides the same images alike
    with pytest.raises(SystemExit):
        main_eval.main(tiny.argv("--resume", tmp_path / "moved.pth", *OWN, "--seed", 9, tag="other"))
    assert "the images that DATA.HOLDOUT holds out are not those of" in caplog.text
    (tmp_path / "holdout.json").write_text((trained / "holdout.json").read_text().replace("cat/", "cats/"))
    with pytest.raises(SystemExit):
        tiny.train("--resume", tmp_path / "moved.pth", *OWN, tag="moved")
    assert "holdout.json holds out are not in DATA.DATA_PATH" in caplog.text


@pytest.mark.parametrize("words", (("DATA.SAMPLER", "balanced"), ("TRAIN.CLASS_WEIGHTS", "balanced")))
def test_balanced_runs_continue_to_the_bit(tiny: TinyRun, trained: Path, words: tuple[str, str]) -> None:
    name = words[0]
    every = ("TRAIN.SAVE_STEPS", 1, "TRAIN.SAVE_KEEP", 9)
    whole = tiny.train("--epochs", 1, *OWN, *words, *every, tag=f"{name}-whole")
    middle = whole / "checkpoint_step_000000002.pth"
    rest = tiny.train("--epochs", 1, "--resume", middle, *OWN, *words, *every, tag=f"{name}-rest")
    ours, theirs = (load_checkpoint(folder / "checkpoint_last.pth")["model"] for folder in (whole, rest))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    plain = load_checkpoint(trained / "checkpoint_last.pth")["model"]
    assert not torch.equal(ours["head.weight"], plain["head.weight"])


def test_an_update_is_repeated_on_the_images_that_it_was_trained_on(tiny: TinyRun, tmp_path: Path) -> None:
    """The list of held-out images beside a dump decides, wherever both lie now and whatever was added to the data."""
    data = shutil.copytree(tiny.data, tmp_path / "data")
    diverging = ("TRAIN.BASE_LR", 1e30, "TRAIN.CLIP_GRAD", 0, "TRAIN.MAX_NONFINITE", 1)
    with pytest.raises(SystemExit):
        tiny.train("--data-path", data, "--epochs", 1, *OWN, *diverging, tag="diverging")
    (tiny.output / "tiny" / "diverging").rename(tmp_path / "moved")
    held_out = set(json.loads((tmp_path / "moved" / "holdout.json").read_text())["images"])
    for number in range(100, 130):
        picture(number).save(data / "dog" / f"{number}.jpg")
    replay = Replay(next((tmp_path / "moved").glob("nonfinite*.pth")), data_path=str(data), device="cpu")
    names = {replay.dataset.sample_name(index).removeprefix(f"{data}/") for index in range(len(replay.dataset))}
    assert len(names) == 18 + 30
    assert not names & held_out


def test_one_class_is_refused(tiny: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, ("cat",), 8)
    with pytest.raises(SystemExit):
        tiny.train("--data-path", tmp_path, *OWN, tag="one")
    assert "there is one class, 'cat'; a classifier needs at least two" in caplog.text


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_have_samples() -> None:
    scores = F.one_hot(torch.tensor([0, 0, 0, 1, 0, 1]), 4).float()  # right: 3 of 4, 1 of 1, 0 of 1
    labels = torch.tensor([0, 0, 0, 0, 2, 1])
    dataset = TensorDataset(scores, labels, torch.arange(6))
    dataset.classes = ["a", "b", "c", "d"]
    result = evaluate(
        torch.nn.Identity(),
        DataLoader(dataset, batch_size=4),
        device=torch.device("cpu"),
        autocast=nullcontext,
        batch_transform=lambda images, targets, indices, **position: (images, targets),
    )
    assert result.balanced_acc1 == pytest.approx(100 * (3 / 4 + 1 + 0) / 3)
    assert result.acc1 == pytest.approx(100 * 4 / 6)


def balanced_loss(smoothing: float = 0.0, *, soft: bool = False) -> torch.nn.Module:
    config = config_with(TRAIN__CLASS_WEIGHTS="balanced", MODEL__LABEL_SMOOTHING=smoothing)
    return build_criterion(config, soft_targets=soft, weights=class_weights(config, LABELS, 3))


def test_weighted_loss_is_as_defined() -> None:
    weights = class_weights(config_with(TRAIN__CLASS_WEIGHTS="balanced"), LABELS, 3)
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 0])
    targets = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    expected = -(weights * targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(balanced_loss(0.1)(logits, labels), expected)
    torch.testing.assert_close(balanced_loss(0.1, soft=True)(logits, targets), expected)  # smoothed already


def test_weighted_loss_does_not_depend_on_how_a_batch_is_divided() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 2, 0, 2])
    loss = balanced_loss(0.1)
    parts = torch.stack([loss(logits[:3], labels[:3]), loss(logits[3:], labels[3:])])
    torch.testing.assert_close(parts.mean(), loss(logits, labels))


def test_the_warning_about_a_recipe_for_far_more_images() -> None:
    published = config_with()
    assert "made for far more than 500 images" in short_of_updates(published, 500, 7)
    assert "2,100 updates in all, 140 of them warm-up" in short_of_updates(published, 500, 7)
    assert short_of_updates(published, 50_000, 781) == ""
    assert short_of_updates(config_with(TRAIN__EPOCHS=30), 500, 7) == ""
