"""DATA.DATASET timm:NAME: torchvision's data sets, folders, tar files, Hugging Face data sets; streams are refused."""

import shutil
import tarfile

import numpy as np
import pytest
import torch

from data import build_dataset, build_train_loader, check_data
from data.sources.base import FolderSource
from tests.builders import data_config
from tests.images import write_splits
from utils.config import load_config
from utils.errors import ImageReadError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder with train/ and val/, and each as a tar file."""
    root = write_splits(tmp_path_factory.mktemp("images"), train=3, val=2)
    for part in ("train", "val"):
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            tar.add(root / part, arcname=".")
    return root


def config_of(name, root="", options="", **keys):
    return data_config(DATA__DATASET=f"timm:{name}", DATA__DATA_PATH=root, DATA__TIMM_OPTIONS=options, **keys)


def both(config):
    return [build_dataset(config, is_train=is_train) for is_train in (True, False)]


@pytest.mark.parametrize("name", ("torch/image_folder", "folder", "tar"))
def test_images_are_those_of_the_folder(images, name):
    config = config_of(name, images)
    datasets = both(config)
    check_data(config, *datasets)
    for part, dataset in zip(("train", "val"), datasets, strict=True):
        folder = FolderSource(images / part, as_array=True)
        assert dataset.classes == folder.classes
        assert dataset.targets.tolist() == folder.targets.tolist()
        for index in range(len(folder.targets)):
            assert dataset.source.read(index) == folder.read(index)
            assert np.array_equal(dataset.source.load(index), folder.load(index))
    assert datasets[0].source.fingerprint() != datasets[1].source.fingerprint()


@pytest.mark.parametrize("name", ("torch/image_folder", "tar"))
def test_any_number_of_workers_gives_the_same_batches(images, name):
    found = []
    for workers in (0, 2):
        loader = build_train_loader(config_of(name, images, DATA__NUM_WORKERS=workers), device="cpu")
        loader.sampler.set_progress(3, 4)
        found.append([batch[0].clone() for batch in loader])
        loader.close()
    assert len(found[0]) == 1
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_mnist_becomes_rgb(tmp_path):
    data = torch.arange(2 * 28 * 28).reshape(2, 28, 28).to(torch.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        head = b"\0\0\x08"
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            head + b"\3" + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28)) + data.numpy().tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + b"\1" + (2).to_bytes(4, "big") + bytes([7, 3]))
    dataset = build_dataset(config_of("torch/mnist", tmp_path, DATA__DOWNLOAD=False), is_train=True)
    assert dataset.targets.tolist() == [7, 3]
    assert len(dataset.classes) == 10
    assert np.array_equal(dataset.source.load(1), np.repeat(data[1].numpy()[..., None], 3, axis=2))


def test_one_set_for_both_parts_is_a_warning(images, caplog):
    config = config_of("folder", images / "train", MODEL__NUM_CLASSES=0)
    check_data(config, *both(config))
    assert "9 of the 9 validation images are training images too" in caplog.text


def test_a_damaged_image_is_named(images, tmp_path):
    root = shutil.copytree(images, tmp_path / "copy")
    (root / "train" / "cat" / "1.jpg").write_bytes(b"<html>")
    dataset = build_dataset(config_of("folder", root), is_train=True)
    with pytest.raises(ImageReadError, match=r"cat/1.jpg \(index 1, class 'cat'\)"):
        dataset[0, 1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    (
        ("hfids/some/set", "", "hfids/ is a stream, which cannot be read at random.*take hfds/"),
        ("tfds/cifar10", "", "tfds/ is a stream.*tools/pack.py"),
        ("wds/set", "", "wds/ is a stream"),
        ("cifar10", "", "unknown; known: timm:folder, timm:tar, timm:torch/NAME, timm:hfds/NAME"),
        ("torch/cifar10", "", "cannot be opened.*not found or corrupted"),
        ("torch/nothing", "", "cannot be opened|opening timm:torch/nothing"),
        ("folder", "split='x'", "DATA.TIMM_OPTIONS: split is unknown; known: train_split"),
        ("folder", "a b", "DATA.TIMM_OPTIONS: 'a b' is not a list such as input_key="),
        ("tar", "train_split='other'", "looks for .*other.tar"),
    ),
)
def test_what_cannot_be_read_at_random_is_refused_in_one_line(images, name, options, message):
    root = images / "train" if name == "tar" else images
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=message) as info:
        build_dataset(config_of(name, root, options, DATA__DOWNLOAD=False), is_train=True)
    assert "\n" not in str(info.value)


def test_names_pass_the_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text("DATA: {DATASET: 'TIMM:hfds/Some/Name'}")
    assert load_config(str(tmp_path / "c.yaml")).DATA.DATASET == "timm:hfds/Some/Name"
    (tmp_path / "c.yaml").write_text("DATA: {DATASET: 'timms'}")
    with pytest.raises(ValueError, match="timm:NAME"):
        load_config(str(tmp_path / "c.yaml"))


def test_hugging_face_data_sets(images, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for part in ("train", "val"):
        folder = FolderSource(images / part, as_array=True)
        rows = {
            "img": [{"bytes": folder.read(i), "path": None} for i in range(len(folder.targets))],
            "label": folder.targets.tolist(),
        }
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=folder.classes)})
        (tmp_path / "set").mkdir(exist_ok=True)
        name = {"train": "train", "val": "test"}[part]
        table = pyarrow.table(rows, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, tmp_path / "set" / f"{name}-0.parquet")
    config = config_of(f"hfds/{tmp_path}/set", tmp_path / "cache", "input_key='img', val_split='test'")
    for part, dataset in zip(("train", "val"), both(config), strict=True):
        folder = FolderSource(images / part, as_array=True)
        assert dataset.classes == folder.classes
        assert dataset.targets.tolist() == folder.targets.tolist()
        assert all(dataset.source.read(index) == folder.read(index) for index in range(len(folder.targets)))
    with pytest.raises((ValueError, RuntimeError), match="timm:hfds"):
        build_dataset(config_of(f"hfds/{tmp_path}/none", tmp_path / "cache"), is_train=True)
