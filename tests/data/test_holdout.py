"""Images that are held out where there is no validation set: DATA.HOLDOUT."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import held_out_images
from data.build import build_dataset
from data.sources.holdout import choose
from tests.builders import data_config
from tests.images import CLASSES, picture, write_folder
from utils.config import run_folder
from utils.config.checks import check_config


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", count=5)


def config_for(folder: Path, **keys: Any):
    return data_config(**{"DATA__DATA_PATH": folder, "DATA__HOLDOUT": 0.4, "OUTPUT": folder.parent / "out", **keys})


def parts(config: Any) -> tuple[set[str], set[str]]:
    """Return the training images and those held out."""
    datasets = [build_dataset(config, is_train=is_train) for is_train in (True, False)]
    assert datasets[0].classes == datasets[1].classes
    return tuple({dataset.sample_name(index) for index in range(len(dataset))} for dataset in datasets)


def store(config: Any) -> None:
    """Store the list as a run does."""
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    held_out_images(config, build_dataset(config, is_train=False)).write(folder)


def test_parts_are_stratified_disjoint_and_complete(images: Path) -> None:
    train, held_out = parts(config_for(images))
    assert not train & held_out
    assert train | held_out == set(map(str, images.glob("*/*.jpg")))
    assert [sum(f"/{name}/" in path for path in held_out) for name in CLASSES] == [2, 2, 2]
    assert parts(config_for(images, SEED=1))[1] != held_out


def test_a_folder_train_and_csv_files_are_divided_too(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "other" / "train")
    assert [len(part) for part in parts(config_for(tmp_path / "other"))] == [9, 6]
    rows = [f"{path.relative_to(images)},{path.parent.name}\n" for path in sorted(images.glob("*/*.jpg"))]
    for name in ("train.csv", "pictures.csv"):
        (images / name).write_text("path,label\n" + "".join(rows))
    same = parts(config_for(images))
    assert parts(config_for(images, DATA__DATASET="csv")) == same
    assert parts(config_for(images / "pictures.csv", DATA__DATASET="csv")) == same


@pytest.mark.parametrize(("share", "count", "expected"), ((0.01, 5, 1), (0.99, 5, 4), (0.5, 2, 1), (0.2, 10, 2)))
def test_every_class_keeps_an_image_in_each_part(share: float, count: int, expected: int) -> None:
    names = [f"{i}.jpg" for i in range(count)]
    assert len(choose(names, np.zeros(count, dtype=np.int64), ["a"], share, 0)) == expected


def test_the_choice_does_not_depend_on_the_order_of_the_files() -> None:
    names, labels = [f"{i}.jpg" for i in range(20)], np.arange(20) % 2
    chosen = choose(names, labels, ["a", "b"], 0.3, 7)
    assert sorted(chosen) == sorted(choose(names[::-1], labels[::-1], ["a", "b"], 0.3, 7))


def test_a_class_with_one_image_is_named(images: Path) -> None:
    for number in range(1, 5):
        (images / "dog" / f"{number}.jpg").unlink()
    with pytest.raises(ValueError, match="some classes have a single image, which cannot be in both parts: 'dog'"):
        parts(config_for(images))


@pytest.mark.parametrize(("dataset", "name"), (("folder", "val"), ("csv", "val.csv")))
def test_a_validation_set_that_exists_is_not_ignored(images: Path, dataset: str, name: str) -> None:
    (images / name).mkdir()
    with pytest.raises(ValueError, match=rf"DATA\.HOLDOUT is 0\.4, but there is .*{name}: set DATA\.HOLDOUT 0"):
        parts(config_for(images, DATA__DATASET=dataset))


def test_the_stored_list_decides(images: Path) -> None:
    config = config_for(images)
    train, held_out = parts(config)
    store(config)
    for number in range(10, 16):
        picture(number).save(images / "cat" / f"{number}.jpg")
    added = {str(images / "cat" / f"{number}.jpg") for number in range(10, 16)}
    assert parts(config) == (train | added, held_out)
    checkpoint = run_folder(config) / "checkpoint_last.pth"
    evaluation = config_for(images, SEED=5, EVAL_MODE=True, MODEL__RESUME=checkpoint, TAG="eval")
    assert parts(evaluation)[1] == held_out
    assert parts(config_for(images, SEED=5))[1] != held_out  # another run in the same folder


def test_the_list_of_other_data_does_not_count(images: Path, tmp_path: Path) -> None:
    store(config_for(images))
    other = write_folder(tmp_path / "other", ("ant", "bee"), count=5)
    config = config_for(other, EVAL_MODE=True, MODEL__RESUME=run_folder(config_for(images)) / "checkpoint_last.pth")
    assert [len(part) for part in parts(config)] == [6, 4]


def test_a_list_that_does_not_fit(images: Path) -> None:
    config = config_for(images)
    store(config)
    gone = sorted(parts(config)[1])[0]
    Path(gone).unlink()
    with pytest.raises(ValueError, match=r"1 of the 6 images that .*holdout\.json holds out are not in"):
        parts(config)
    (run_folder(config) / "holdout.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"holdout\.json is not the list of the held-out images"):
        parts(config)


def test_folders_without_val_are_told_of_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", count=2)
    with pytest.raises(FileNotFoundError, match=r"only train/ is: hold out a part of it with --opts DATA\.HOLDOUT"):
        build_dataset(data_config(DATA__DATA_PATH=tmp_path), is_train=False)


def test_a_share_of_the_training_images_is_stratified_and_chosen_by_the_seed(images: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(images, tmp_path / "data" / part)

    def training_and_validation(**keys: Any) -> tuple[set[str], set[str]]:
        return parts(config_for(tmp_path / "data", DATA__HOLDOUT=0.0, DATA__TRAIN_SHARE=0.4, **keys))

    some, validation = training_and_validation()
    assert [sum(f"/{name}/" in path for path in some) for name in CLASSES] == [2, 2, 2]
    assert len(validation) == 15
    assert training_and_validation()[0] == some
    assert training_and_validation(SEED=1)[0] != some
    half, held_out = parts(config_for(images, DATA__TRAIN_SHARE=0.34))  # of the three images that are not held out
    assert len(half) == 3
    assert not half & held_out


def test_a_share_of_images_in_memory() -> None:
    config = data_config(DATA__DATASET="digits", DATA__TRAIN_SHARE=0.1)
    assert [len(build_dataset(config, is_train=is_train)) for is_train in (True, False)] == [143, 359]


@pytest.mark.parametrize("keys", ({"DATA__ZIP_MODE": True}, {"DATA__DATASET": "shards"}))
def test_archives_have_no_share(keys: dict[str, Any]) -> None:
    problems = check_config(data_config(DATA__TRAIN_SHARE=0.5, **keys))
    assert any(problem.text.startswith("DATA.TRAIN_SHARE takes a part of folders") for problem in problems)
