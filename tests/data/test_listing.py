"""Which files count as images: for ordinary folders what torchvision takes, and a word about everything else."""

import logging
import os
import shutil
import socket
import time

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from categories101_train_val_split import list_classes
from categories101_train_val_split import main as split_main
from data import build_dataset, check_data, expanded_path, list_images, read_image_file
from data.sources.base import FolderSource
from data.sources.listing import IMAGE_ENDINGS
from tests.builders import data_config
from tests.images import picture, write_folder, write_splits
from utils.errors import ImageReadError


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "train")


def folder_source(root):
    return FolderSource(root, as_array=True)


def test_order_is_torchvisions(root):
    """Folders within classes, names that sort otherwise as whole paths, a link to a folder, empty folders."""
    for name in ("cat/a", "cat/a-b", "cat/a/b", "cat-2", "Cat"):
        (root / name).mkdir()
        picture(1).save(root / name / "z.PNG")
        picture(2).save(root / name / "a.jpeg")
    (root / "emu" / "linked").symlink_to(shutil.move(root / "cat" / "a-b", root.parent / "elsewhere"))
    (root / "none").mkdir()
    theirs, ours = ImageFolder(root, allow_empty=True), folder_source(root)
    assert ours.classes == theirs.classes
    assert ours.targets.tolist() == theirs.targets
    assert [ours.name(index) for index in range(len(ours.targets))] == [path for path, _ in theirs.samples]


FORMATS = (("jfif", "JPEG"), ("jpe", "JPEG"), ("gif", "GIF"), ("avif", "AVIF"), ("jp2", "JPEG2000"), ("tga", "TGA"))


@pytest.mark.parametrize(("ending", "kind"), FORMATS)
def test_what_pillow_reads_is_taken(root, ending, kind):
    before = len(folder_source(root).targets)
    picture(7).save(root / "cat" / f"new.{ending.upper()}", kind)
    source = folder_source(root)
    assert len(source.targets) == before + 1
    index = next(i for i in range(before + 1) if source.name(i).endswith("new." + ending.upper()))
    assert np.asarray(source.load(index)).shape == (48, 64, 3)


def test_every_ending_is_one_of_pillows():
    Image.init()
    assert {ending for ending in IMAGE_ENDINGS if ending not in Image.registered_extensions()} <= {".jif"}


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "PPM"))
def test_images_without_ending_are_known_by_their_first_bytes(root, kind):
    picture(7).save(root / "dog" / "photo", kind)
    (root / "dog" / "README").write_text("no image")
    listing = list_images(root)
    assert "dog/photo" in listing.images
    assert dict(listing.other_files) == {"without ending": 1}


def test_files_that_were_not_taken_are_counted(root, caplog):
    for name in ("a.heic", "b.HEIC", "c.txt", "LICENSE", "d.mp4"):
        (root / "cat" / name).write_text("x")
    picture(1).save(root / "loose.jpg")
    with caplog.at_level(logging.WARNING):
        source = folder_source(root)
    assert len(source.targets) == 15
    assert "5 files were not taken: .heic 2, " in caplog.text
    assert "without ending 1" in caplog.text
    assert "1 images outside the class folders were not taken" in caplog.text


def test_leftovers_of_desktops_are_neither_images_nor_classes(root, caplog):
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash-1000"):
        for parent in (root, root / "cat"):
            (parent / folder).mkdir()
            picture(1).save(parent / folder / "0.jpg")
    (root / "cat" / "._0.jpg").write_bytes(b"\0\5\26\7")
    (root / "cat" / "._1.jpg").write_bytes(b"\0\5\26\7")
    (root / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / ".DS_Store").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        source = folder_source(root)
    assert source.classes == ["cat", "dog", "emu"]
    assert len(source.targets) == 15
    assert "hidden and system files" in caplog.text
    assert "._* 2" in caplog.text
    assert "@eaDir 2" in caplog.text


@pytest.mark.parametrize("target", (".", "..", "../cat"))
def test_links_in_a_circle_are_refused_by_name(root, target):
    (root / "cat" / "again").symlink_to(target)
    (root / "cat" / "again2").symlink_to(target)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"cat/again2? and .*train(/cat)? are the same folder"):
        folder_source(root)
    assert time.monotonic() - started < 5


def test_a_folder_that_two_links_reach_is_refused(root, tmp_path):
    write_folder(tmp_path / "pool", ("x",))
    (root / "cat" / "one").symlink_to(tmp_path / "pool" / "x")
    (root / "dog" / "two").symlink_to(tmp_path / "pool" / "x")
    with pytest.raises(ValueError, match="count more than once"):
        folder_source(root)


def test_the_same_folder_may_be_both_parts(tmp_path):
    write_folder(tmp_path / "train")
    (tmp_path / "val").symlink_to("train")
    config = data_config(DATA__DATA_PATH=tmp_path)
    check_data(config, build_dataset(config, is_train=True), build_dataset(config, is_train=False))


def make_socket(path):
    bound = socket.socket(socket.AF_UNIX)
    directory = os.open(path.parent, os.O_RDONLY)
    try:  # a short name: the whole path may be too long for a socket
        bound.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)
        bound.close()


SPECIAL = (
    (lambda path: path.symlink_to("nowhere.jpg"), "a link to nothing"),
    (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    (lambda path: path.symlink_to("/dev/zero"), "a device"),
    (os.mkfifo, "a FIFO"),
    (make_socket, "a socket"),
)


@pytest.mark.parametrize(("make", "kind"), SPECIAL)
@pytest.mark.parametrize("name", ("z.jpg", "z"))
def test_what_is_no_file_is_refused_by_name(root, make, kind, name):
    make(root / "cat" / name)
    with pytest.raises(ValueError, match=rf"1 images that cannot be read \('cat/{name}: {kind}'\)"):
        folder_source(root)
    with pytest.raises(ValueError, match=f"first cat/{name}"):
        list_classes(root)


@pytest.mark.parametrize(("make", "kind"), (*SPECIAL[2:4], (os.mkdir, "")))
def test_what_becomes_another_thing_later_never_blocks(root, make, kind):
    source = folder_source(root)
    (root / "cat" / "0.jpg").unlink()
    make(root / "cat" / "0.jpg")
    with pytest.raises(ImageReadError, match=f"not a regular file but {kind}" if kind else "directory"):
        source.load(0)


def test_a_folder_that_cannot_be_listed_is_an_error(root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("data.sources.listing.os.scandir", refuse)
    with pytest.raises(PermissionError, match="dog"):
        folder_source(root)


def test_check_data_and_split_list_what_training_lists(root):
    (root / "cat" / "deeper").mkdir()
    picture(1).save(root / "cat" / "deeper" / "x.gif")
    source = folder_source(root)
    names = [source.name(index) for index in range(len(source.targets))]
    assert [str(root / path) for path in list_images(root).images] == names
    assert [str(root / name / path) for name, paths in list_classes(root).items() for path in paths] == names


def test_split_keeps_folders_below_a_class(tmp_path, capsys):
    source = write_folder(tmp_path / "source", ("cat", "dog"))
    (source / "cat" / "deeper").mkdir()
    for number in range(5):
        picture(number).save(source / "cat" / "deeper" / f"{number}.jpg")
    (source / "cat" / "video.mp4").write_bytes(b"x")
    target = tmp_path / "target"
    assert split_main(["--source", str(source), "--target", str(target)]) == 0
    assert len(list_images(target).images) == 15
    assert "1 file was not taken: .mp4 1" in capsys.readouterr().err


def test_paths_of_the_tools_are_expanded(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    assert expanded_path("~/x") == tmp_path / "x"
    assert expanded_path("${SCRATCH}/x") == tmp_path / "scratch" / "x"
    write_folder(tmp_path / "source")
    assert split_main(["--source=~/source", "--target=$SCRATCH/split"]) == 0
    assert (tmp_path / "scratch" / "split" / "train" / "cat").is_dir()
    with pytest.raises(SystemExit):
        split_main(["--source=$NOT_SET/x", "--target=y"])
    assert "variable NOT_SET, which is not set" in capsys.readouterr().err


def test_reading_a_regular_file(root):
    assert read_image_file(str(root / "cat" / "0.jpg")) == (root / "cat" / "0.jpg").read_bytes()


# --- classes of train and val ---


def test_val_may_lack_a_class(tmp_path, caplog):
    write_splits(tmp_path)
    shutil.rmtree(tmp_path / "val" / "dog")
    config = data_config(DATA__DATA_PATH=tmp_path)
    train, val = (build_dataset(config, is_train=is_train) for is_train in (True, False))
    assert val.classes == train.classes
    assert sorted(set(val.targets.tolist())) == [0, 2], "the labels are those of training"
    with caplog.at_level(logging.WARNING):
        check_data(config, train, val)
    assert "val: 1 class has no images: 'dog'; the results say nothing about it" in caplog.text


def test_val_without_train_has_classes_of_its_own(tmp_path):
    write_folder(tmp_path / "val", ("b", "a"))
    assert build_dataset(data_config(DATA__DATA_PATH=tmp_path), is_train=False).classes == ["a", "b"]


def test_two_unicode_spellings_are_told_apart(tmp_path):
    write_splits(tmp_path, ("caf\u00e9", "dog", "emu"))
    (tmp_path / "val" / "caf\u00e9").rename(tmp_path / "val" / "cafe\u0301")
    config = data_config(DATA__DATA_PATH=tmp_path)
    train, val = (build_dataset(config, is_train=is_train) for is_train in (True, False))
    with pytest.raises(ValueError, match="look alike") as info:
        check_data(config, train, val)
    assert r"'caf\xe9' in train and 'cafe\u0301' in val" in str(info.value)
    assert "convmv" in str(info.value)
    write_folder(tmp_path / "train2" / "train", ("caf\u00e9", "cafe\u0301", "dog"))
    config = data_config(DATA__DATA_PATH=tmp_path / "train2")
    with pytest.raises(ValueError, match="names look alike"):
        check_data(config, build_dataset(config, is_train=True), None)


# --- another layout than the wanted one ---


def _zipped(root):
    (root / "train.zip").write_bytes(b"x")


LAYOUTS = (
    (write_splits, "CIFAR10", False, r"--dataset folder, without --zip"),
    (write_splits, "folder", True, r"--dataset folder, without --zip"),
    (write_folder, "folder", False, r"categories101_train_val_split\.py --source"),
    (lambda root: (root / "cifar-10-batches-py").mkdir(parents=True), "folder", False, r"--dataset CIFAR10"),
    (lambda root: (root / "cifar-10-batches-py").mkdir(parents=True), "CIFAR100", False, r"--dataset CIFAR10$"),
    (_zipped, "folder", False, r"--dataset folder --zip"),
    (lambda root: write_folder(root / "training"), "folder", False, "rename it to train"),
)


@pytest.mark.parametrize(("make", "dataset", "zip_mode", "message"), LAYOUTS)
def test_data_in_another_form_name_what_reads_them(tmp_path, make, dataset, zip_mode, message):
    make(tmp_path)
    config = data_config(DATA__DATA_PATH=tmp_path, DATA__DATASET=dataset, DATA__ZIP_MODE=zip_mode)
    with pytest.raises(FileNotFoundError, match=message):
        build_dataset(config, is_train=True)
    assert not list(tmp_path.glob("*.gz")), "nothing was downloaded"


def test_validation_folder_of_another_name(tmp_path):
    write_splits(tmp_path)
    (tmp_path / "val").rename(tmp_path / "valid")
    with pytest.raises(FileNotFoundError, match="valid/ is: rename it to val"):
        build_dataset(data_config(DATA__DATA_PATH=tmp_path), is_train=False)


def test_path_of_a_part_names_the_folder_above(tmp_path):
    write_splits(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"--data-path {tmp_path}$"):
        build_dataset(data_config(DATA__DATA_PATH=tmp_path / "train"), is_train=True)
