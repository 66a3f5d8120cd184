"""Whether a run may continue a checkpoint, and what it is warned of."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from data.images.transforms import build_transform
from tests.builders import config_with
from utils.checkpoint.resume import check_continuation, checkpoint_metadata, class_columns, warn_preprocessing
from utils.errors import CheckpointError

PATH = Path("run/checkpoint_last.pth")
CLASSES = ("cat", "dog", "emu")


def payload(classes: tuple[str, ...] = CLASSES, num_samples: int = 48, seen: int = 0, **keys: Any) -> dict[str, Any]:
    """The entries of a checkpoint that are compared."""
    return {
        **checkpoint_metadata(config_with(**keys), classes, num_samples),
        "progress": {"epoch": 0, "samples_seen": seen},
    }


def check(saved: dict[str, Any], *allowed: str, **keys: Any) -> None:
    config = config_with(**keys)
    check_continuation(config, checkpoint_metadata(config, CLASSES, 48), saved, PATH, allowed)


def test_the_same_run_continues_without_a_warning(caplog) -> None:
    check(payload())
    assert not caplog.records


def test_every_changed_key_of_the_recipe_is_named() -> None:
    with pytest.raises(CheckpointError, match="was trained with another recipe") as error:
        check(payload(), TRAIN__BASE_LR=0.25, TRAIN__EPOCHS=7)
    assert "TRAIN.BASE_LR: 0.0005 in the checkpoint, 0.25 now (allow with --allow-change TRAIN.BASE_LR)" in str(
        error.value
    )
    assert "TRAIN.EPOCHS: " in str(error.value)


def test_a_change_that_is_allowed_is_logged(caplog) -> None:
    check(payload(), "TRAIN.BASE_LR", TRAIN__BASE_LR=0.25)
    assert "TRAIN.BASE_LR changes on resume: 0.0005 -> 0.25" in caplog.text


def test_the_batch_may_change_without_permission(caplog) -> None:
    check(payload(), DATA__BATCH_SIZE=6, TRAIN__ACCUMULATION_STEPS=3)
    assert "DATA.BATCH_SIZE changes on resume" in caplog.text
    assert "TRAIN.ACCUMULATION_STEPS changes on resume" in caplog.text


@pytest.mark.parametrize(
    ("classes", "message"),
    (
        (("cat", "dog", "owl"), "class 2 is 'owl' there and 'emu' here"),
        (("cat", "dog"), "2 classes there, 3 here"),
    ),
    ids=("name", "number"),
)
def test_other_classes_are_refused(classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check(payload(classes))


@pytest.mark.parametrize("seen", (0, 12))
def test_another_number_of_images_is_logged(caplog, seen: int) -> None:
    check(payload(num_samples=47, seen=seen))
    assert "was trained on 47 images, this data set has 48" in caplog.text
    assert ("twice or not at all in the epoch in progress" in caplog.text) == bool(seen)


def test_other_preprocessing_is_logged(caplog) -> None:
    warn_preprocessing(config_with(DATA__IMG_SIZE=96), payload(), PATH)
    assert (
        "preprocessing img_size: run/checkpoint_last.pth was trained with 224, this evaluation uses 96" in caplog.text
    )
    caplog.clear()
    warn_preprocessing(config_with(), {}, PATH)  # a file of others, which says nothing about it
    assert not caplog.records


@pytest.mark.parametrize(
    ("keys", "expected"),
    (
        ({}, (True, 256)),
        ({"TEST__CROP": False}, (False, None)),
        ({"DATA__IMG_SIZE": 32}, (True, 32)),
        ({"DATA__IMG_SIZE": 32, "TEST__CROP": False}, (True, 32)),
    ),
)
def test_the_preprocessing_that_is_stored_is_what_evaluation_does(keys: dict[str, Any], expected: tuple) -> None:
    stored = payload(**keys)["preprocessing"]
    transform = build_transform(config_with(**keys), is_train=False)
    assert (stored["crop"], stored["short_side"]) == expected
    assert transform.short_side == expected[1]


def test_older_files_of_small_images_say_what_evaluation_does(caplog) -> None:
    saved = payload(DATA__IMG_SIZE=32, TEST__CROP=False)
    del saved["preprocessing"]["short_side"]
    saved["preprocessing"]["crop"] = False  # the key's value, which has no effect up to 32 pixels
    warn_preprocessing(config_with(DATA__IMG_SIZE=32, TEST__CROP=False), saved, PATH)
    assert not caplog.records
    saved["preprocessing"]["img_size"] = 64
    warn_preprocessing(config_with(DATA__IMG_SIZE=64), saved, PATH)
    assert "preprocessing crop" in caplog.text


def test_classes_known_by_number_alone_are_refused_with_a_way_out() -> None:
    numbers = ("0", "1", "2")
    with pytest.raises(CheckpointError, match="class 0 is '0' there and 'cat' here.*links to yours will do"):
        check(payload(numbers))
    with pytest.raises(CheckpointError, match="class 0 is 'cat' there and '0' here.*write their names into the map"):
        class_columns(numbers, payload(), PATH, 3)


def test_a_timm_model_that_expects_other_images_is_warned_of_once(caplog) -> None:
    config = config_with(MODEL__TYPE="timm")
    with torch.device("meta"):
        for name, expected in (("vit_tiny_patch16_224", 1), ("resnet18.tv_in1k", 1)):
            caplog.clear()
            warn_preprocessing(config, {}, PATH, timm.create_model(name))
            assert len(caplog.records) == expected
    assert "interpolation bilinear (here bicubic)" in caplog.text
    assert "mean" not in caplog.text
    caplog.clear()
    warn_preprocessing(config, payload(), PATH, timm.create_model("resnet18.tv_in1k"))  # says how it was trained
    assert not caplog.records
