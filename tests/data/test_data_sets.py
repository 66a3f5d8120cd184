"""One sample: its own random state, its name in every error, its replacement if it cannot be read."""

import logging
import random

import numpy as np
import pytest
import torch

from data import build_dataset, check_data, describe_classes
from data.dataset import ImageDataset
from tests.builders import data_config
from tests.images import write_splits
from utils.errors import ImageReadError


@pytest.fixture
def folder(tmp_path):
    return write_splits(tmp_path)


def build_datasets(config):
    return build_dataset(config, is_train=True), build_dataset(config, is_train=False)


def streams():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("pipeline", ("fast", "reference"))
def test_sample_depends_on_seed_epoch_and_index_only(folder, pipeline):
    dataset = build_dataset(data_config(DATA__DATA_PATH=folder, DATA__PIPELINE=pipeline), is_train=True)
    other_seed = build_dataset(data_config(DATA__DATA_PATH=folder, DATA__PIPELINE=pipeline, SEED=1), is_train=True)
    first = np.asarray(dataset[0, 4][0])
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert np.array_equal(np.asarray(dataset[0, 4][0]), first)
    assert not np.array_equal(np.asarray(dataset[1, 4][0]), first)
    assert not np.array_equal(np.asarray(other_seed[0, 4][0]), first)
    assert dataset[0, 4][1:] == (int(dataset.targets[4]), 4)


def test_each_sample_has_random_streams_of_its_own():
    def draw(_):
        return np.array([random.random(), np.random.rand(), torch.rand(()).item()])

    datasets = [ImageDataset(HalfBroken(0), draw, seed=seed) for seed in (0, 1)]
    keys = [(datasets[0], 0, 0), (datasets[0], 0, 1), (datasets[0], 1, 0), (datasets[1], 0, 0)]
    drawn = np.stack([dataset[epoch, index][0] for dataset, epoch, index in keys])
    assert all(len(set(stream)) == len(keys) for stream in drawn.T)


def test_a_repetition_is_the_same_image_with_random_numbers_of_its_own(folder):
    dataset = build_dataset(data_config(DATA__DATA_PATH=folder), is_train=True)
    again = 4 + len(dataset)
    assert dataset[0, again][1:] == (int(dataset.targets[4]), again)
    assert not np.array_equal(np.asarray(dataset[0, again][0]), np.asarray(dataset[0, 4][0]))
    assert dataset.sample_name(again) == dataset.sample_name(4)
    assert dataset.describe(again) == dataset.describe(4)


def test_loading_leaves_the_random_streams_alone(folder):
    train, val = build_datasets(data_config(DATA__DATA_PATH=folder))
    before = streams()
    train[2, 7], val[1]
    assert streams() == before


def test_evaluation_is_deterministic(folder):
    val = build_dataset(data_config(DATA__DATA_PATH=folder), is_train=False)
    assert np.array_equal(val[2][0], val[2][0])


# --- images that cannot be read ---


def break_files(dataset, *indices):
    for index in indices:
        with open(dataset.sample_name(index), "r+b") as file:
            file.truncate(300)


@pytest.mark.parametrize("pipeline", ("fast", "reference"))
def test_error_names_path_index_and_class(folder, pipeline):
    train, val = build_datasets(data_config(DATA__DATA_PATH=folder, DATA__PIPELINE=pipeline))
    break_files(train, 6)
    with pytest.raises(ImageReadError, match=r"train/dog/1\.jpg \(index 6, class 'dog'\): .*runcated.*BAD_IMAGES"):
        train[0, 6]
    break_files(val, 0)
    with pytest.raises(ImageReadError, match=r"val/cat/0\.jpg \(index 0, class 'cat'\)"):
        val[0]
    assert train.bad_indices() == []


def test_failing_transform_names_the_image_and_is_never_skipped(folder):
    source = build_dataset(data_config(DATA__DATA_PATH=folder), is_train=True).source

    def fail(_):
        raise ZeroDivisionError("by design")

    with pytest.raises(RuntimeError, match=r"train/cat/2\.jpg \(index 2, class 'cat'\): by design") as info:
        ImageDataset(source, fail, seed=0, skip_bad=True)[0, 2]
    assert not isinstance(info.value, ImageReadError)


def test_skip_replaces_by_another_sample_of_the_same_epoch(folder, caplog):
    config = data_config(DATA__DATA_PATH=folder, DATA__BAD_IMAGES="skip")
    dataset = build_dataset(config, is_train=True)
    break_files(dataset, 3, 8)
    with caplog.at_level(logging.WARNING):
        image, target, index = dataset[5, 3]
        assert dataset[5, 3][2] == index
    assert index not in (3, 8)
    assert target == dataset.targets[index]
    assert np.array_equal(image, dataset[5, index][0]), "not the sample of that epoch"
    assert dataset.bad_indices() in ([3], [3, 8])
    messages = [record.message for record in caplog.records]
    assert sum("(index 3," in message for message in messages) == 1, "logged once"
    assert messages[0].startswith("skipped: cannot read image")
    again = build_dataset(config, is_train=True)
    assert again[5, 3][2] == index, "the replacement must not depend on what happened before"
    assert len({dataset[epoch, 3][2] for epoch in range(12)}) > 3, "always the same replacement"


def test_evaluation_never_skips(folder):
    val = build_dataset(data_config(DATA__DATA_PATH=folder, DATA__BAD_IMAGES="skip"), is_train=False)
    break_files(val, 1)
    with pytest.raises(ImageReadError, match="index 1"):
        val[1]


def test_skip_gives_up_when_the_storage_is_broken(folder):
    dataset = build_dataset(data_config(DATA__DATA_PATH=folder, DATA__BAD_IMAGES="skip"), is_train=True)
    break_files(dataset, *range(15))
    with pytest.raises(ImageReadError, match="gives up: 11 images could not be read, more than 10"):
        dataset[0, 0]


def test_skip_finds_a_good_image_among_many_bad_ones(folder):
    """Two thirds are bad, so that the replacement is bad too, again and again."""
    dataset = build_dataset(data_config(DATA__DATA_PATH=folder, DATA__BAD_IMAGES="skip"), is_train=True)
    break_files(dataset, *range(10))
    assert all(dataset[epoch, index][2] >= 10 for epoch in range(5) for index in range(15))
    assert dataset.bad_indices() == list(range(10))


class HalfBroken:
    """Source of 1200 images, of which the first ``bad`` cannot be read."""

    def __init__(self, bad):
        self.bad = bad
        self.classes = ["only"]
        self.targets = np.zeros(1200, dtype=np.int64)

    def name(self, index):
        return f"image {index}"

    def load(self, index):
        if index < self.bad:
            raise ImageReadError("broken")
        return np.zeros((2, 2, 3), np.uint8)


def test_skip_bears_one_in_a_hundred():
    keys = [(0, index) for index in range(60)]
    assert len(ImageDataset(HalfBroken(12), np.asarray, seed=0, skip_bad=True).__getitems__(keys)) == 60
    with pytest.raises(ImageReadError, match="gives up: 13 images could not be read, more than 12"):
        ImageDataset(HalfBroken(13), np.asarray, seed=0, skip_bad=True).__getitems__(keys)


# --- checks before training ---


def problems(config, train=None, val=None):
    with pytest.raises(ValueError, match="the data cannot be used") as info:
        check_data(config, train, val)
    return str(info.value)


def test_good_data_passes(folder):
    config = data_config(DATA__DATA_PATH=folder)
    check_data(config, *build_datasets(config))
    check_data(config, None, build_dataset(config, is_train=False))


def test_all_problems_are_listed_at_once(tmp_path):
    write_splits(tmp_path)
    (tmp_path / "train" / "zebra").mkdir()
    (tmp_path / "val" / "fox").mkdir()
    config = data_config(DATA__DATA_PATH=tmp_path, MODEL__NUM_CLASSES=10, DATA__BATCH_SIZE=33)
    text = problems(config, *build_datasets(config))
    assert "train: 4 classes ('cat', 'dog', 'emu', 'zebra'), but MODEL.NUM_CLASSES is 10" in text
    assert "train: 1 class has no images: 'zebra'" in text
    assert "different classes, so their labels differ (only in train: 'zebra'; only in val: 'fox')" in text
    assert "DATA.BATCH_SIZE 33 is larger than the 15 training images" in text
    assert str(tmp_path) in text


def test_batch_of_all_processes_must_fit(folder, monkeypatch):
    monkeypatch.setattr("data.checks.get_world_size", lambda: 4)
    config = data_config(DATA__DATA_PATH=folder)
    assert "4 processes takes 16 images" in problems(config, *build_datasets(config))
    monkeypatch.setattr("data.checks.get_world_size", lambda: 3)
    check_data(data_config(DATA__DATA_PATH=folder, DATA__BATCH_SIZE=5), *build_datasets(config))  # 15 of 15


def test_classes_in_another_order_are_a_problem(folder):
    config = data_config(DATA__DATA_PATH=folder)
    train, val = build_datasets(config)
    val.classes = val.classes[::-1]
    assert "their labels differ (another order)" in problems(config, train, val)


def test_labels_outside_the_classes_are_named(folder):
    config = data_config(DATA__DATA_PATH=folder)
    train = build_dataset(config, is_train=True)
    train.targets[4], train.targets[14] = -1, 3
    text = problems(config, train)
    assert "2 labels are outside 0..2, the first is -1 of" in text
    assert "cat/4.jpg" in text


def test_tolerating_truncated_files_is_a_problem(folder, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    config = data_config(DATA__DATA_PATH=folder)
    assert "LOAD_TRUNCATED_IMAGES" in problems(config, *build_datasets(config))


def test_names_of_classes_are_escaped_in_the_log(tmp_path):
    data = write_splits(tmp_path / "data", ("a\nb", "\x1b[31m"), train=2, val=1)
    dataset = build_dataset(data_config(DATA__DATA_PATH=data, MODEL__NUM_CLASSES=2), is_train=True)
    assert describe_classes(dataset) == r"\x1b[31m 2, a\nb 2"
