"""Sources: folders, archives, CIFAR, digits."""

import copy
import hashlib
import multiprocessing
import os
import zipfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

from data import build_dataset
from data.sources import builtin
from data.sources.base import ArraySource, FolderSource, PackedStrings
from data.sources.zip import ZipSource, number_classes, read_map
from tests.builders import data_config
from tests.images import write_folder, write_splits
from utils.config import FOLDER_DATASETS
from utils.errors import ImageReadError


def test_packed_strings_give_the_strings_back():
    strings = ["", "a", "päth/ü.jpg", "last"]
    assert [PackedStrings(strings)[i] for i in range(4)] == strings
    assert len(PackedStrings(strings)) == 4


# --- folders ---


@pytest.mark.parametrize("name", FOLDER_DATASETS)
def test_folder_lists_what_image_folder_lists(tmp_path, name):
    write_splits(tmp_path)
    (tmp_path / "train" / "cat" / "deeper").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "cat" / "deeper" / "x.png")
    (tmp_path / "train" / "cat" / "readme.txt").write_text("no image")
    dataset = build_dataset(data_config(DATA__DATASET=name, DATA__DATA_PATH=tmp_path), is_train=True)
    listing = ImageFolder(str(tmp_path / "train"))
    assert dataset.classes == listing.classes
    assert dataset.targets.tolist() == listing.targets
    assert [dataset.sample_name(i) for i in range(len(dataset))] == [path for path, _ in listing.samples]
    pixels = np.asarray(dataset.source.load(3))
    assert np.array_equal(pixels, np.asarray(listing[3][0]))


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda root: None, "no folder"),
        (lambda root: (root / "train").mkdir(), "no class folders"),
        (lambda root: (root / "train" / "cat").mkdir(parents=True), "1 class folders but no image"),
    ),
)
def test_missing_folders_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(FileNotFoundError, match=message) as info:
        build_dataset(data_config(DATA__DATA_PATH=tmp_path), is_train=True)
    assert str(tmp_path / "train") in str(info.value)


def test_no_path_is_an_error_of_its_own():
    with pytest.raises(ValueError, match="--data-path"):
        build_dataset(data_config(), is_train=True)


def test_deleted_file_is_an_error_of_that_image(tmp_path):
    source = FolderSource(write_folder(tmp_path / "train"), as_array=True)
    (tmp_path / "train" / "cat" / "0.jpg").unlink()
    with pytest.raises(ImageReadError, match="No such file"):
        source.load(0)


def _rename(root):
    (root / "train" / "cat" / "0.jpg").rename(root / "train" / "cat" / "00.jpg")


def _touch(root, name="train/cat/0.jpg"):
    status = (root / name).stat()
    os.utime(root / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def _lengthen(root):
    file = root / "train" / "cat" / "0.jpg"
    status = file.stat()
    file.write_bytes(file.read_bytes() + b"\0")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", (_rename, _touch, _lengthen))
def test_fingerprint_of_a_folder_tells_changed_files(tmp_path, change):
    write_folder(tmp_path / "train")
    before = FolderSource(tmp_path / "train", as_array=True).fingerprint()
    assert FolderSource(tmp_path / "train", as_array=False).fingerprint() == before
    change(tmp_path)
    assert FolderSource(tmp_path / "train", as_array=True).fingerprint() != before


def test_fingerprint_of_arrays_tells_changed_pixels():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    before = ArraySource(images, [0, 0], ["a"], title="x", as_array=True).fingerprint()
    images[1, 3, 3, 2] = 1
    assert ArraySource(images, [0, 0], ["a"], title="x", as_array=True).fingerprint() != before


# --- archives ---


@pytest.fixture
def archive(tmp_path):
    """Folder with train.zip (half of it compressed), its map, and the same images unpacked in train/."""
    write_folder(tmp_path / "train")
    source = FolderSource(tmp_path / "train", as_array=True)
    lines = []
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as file:
        for index in range(len(source.targets)):
            path = source.name(index).removeprefix(f"{tmp_path}/train/")
            member = zipfile.ZipInfo(path)
            member.extra = b"UT\x01\x00\x00" * (index % 3)  # as Info-ZIP writes times; it lies before the data
            file.writestr(member, source.read(index), zipfile.ZIP_DEFLATED if index % 2 else zipfile.ZIP_STORED)
            lines.append(f"{path}\t{source.targets[index]}")
    (tmp_path / "train_map.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize("cache_mode", ("no", "part", "full"))
def test_archive_holds_the_same_images_as_the_folder(archive, cache_mode):
    config = data_config(DATA__DATA_PATH=archive, DATA__ZIP_MODE=True, DATA__CACHE_MODE=cache_mode)
    packed, folder = build_dataset(config, is_train=True), FolderSource(archive / "train", as_array=True)
    assert packed.targets.tolist() == folder.targets.tolist()
    assert packed.classes == folder.classes, "numbered classes have the names of their folders"
    for index in range(len(packed)):
        assert np.array_equal(packed.source.load(index), folder.load(index))
    assert packed.sample_name(0).endswith("train.zip@/cat/0.jpg")


def test_part_keeps_this_process_share(archive, monkeypatch):
    monkeypatch.setattr("data.sources.zip.get_world_size", lambda: 3)
    monkeypatch.setattr("data.sources.zip.get_rank", lambda: 1)
    source = ZipSource(archive, "train", cache_mode="part", as_array=True)
    kept = [index for index in range(15) if len(source._cached[index])]
    assert kept == [1, 4, 7, 10, 13]
    expected = [source.load(index) for index in range(15)]
    (archive / "train.zip").write_bytes(b"")  # what is kept needs no archive any more
    in_worker = copy.copy(source)  # without the open file
    assert np.array_equal(in_worker.load(4), expected[4])
    with pytest.raises(ImageReadError, match="archive"):
        in_worker.load(0)


def _load_all(source, results):
    results.put([int(np.asarray(source.load(index)).sum()) for index in range(15)])


def test_processes_read_the_archive_at_the_same_time(archive):
    source = ZipSource(archive, "train", cache_mode="no", as_array=True)
    expected = [int(np.asarray(source.load(index)).sum()) for index in range(15)]  # opens the file before the fork
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_load_all, args=(source, results)) for _ in range(4)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [expected] * 4
    for child in children:
        child.join()


def test_damaged_member_is_an_error_not_noise(archive):
    source = ZipSource(archive, "train", cache_mode="no", as_array=True)
    content = bytearray((archive / "train.zip").read_bytes())
    content[200] ^= 0xFF  # inside the first member, which is stored
    (archive / "train.zip").write_bytes(bytes(content))
    with pytest.raises(ImageReadError, match="CRC"):
        source.load(0)
    with zipfile.ZipFile(archive / "train.zip") as file:
        last = file.infolist()[-1].header_offset
    os.truncate(archive / "train.zip", last + 100)  # within its data
    with pytest.raises(ImageReadError, match="truncated"):
        source.load(14)


def test_fingerprint_of_an_archive_tells_a_changed_archive_or_list(archive):
    def fingerprint():
        return ZipSource(archive, "train", cache_mode="no", as_array=True).fingerprint()

    map_file = archive / "train_map.txt"
    prints = [fingerprint()]
    map_file.write_text("".join(f"{line}\n" for line in reversed(map_file.read_text().splitlines())))
    prints.append(fingerprint())
    _touch(archive, "train.zip")
    prints.append(fingerprint())
    assert len(set(prints)) == 3


def test_archive_problems_name_the_file(archive):
    map_file = archive / "train_map.txt"
    map_file.write_text("cat/0.jpg\t0\ncat/none.jpg\t0\n")
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        ZipSource(archive, "train", cache_mode="no", as_array=True)
    map_file.write_text("cat/0.jpg 0\n")
    with pytest.raises(ValueError, match=r"line 1: expected 'path<TAB>class'"):
        ZipSource(archive, "train", cache_mode="no", as_array=True)
    map_file.write_text("\n")
    with pytest.raises(ValueError, match="no images"):
        read_map(map_file)
    with pytest.raises(FileNotFoundError, match=r"val\.zip"):
        ZipSource(archive, "val", cache_mode="no", as_array=True)
    map_file.write_text("cat/0.jpg\t0\n")
    (archive / "train.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a readable zip archive"):
        ZipSource(archive, "train", cache_mode="no", as_array=True)


def test_classes_of_a_map_are_numbers_or_names():
    names, targets = number_classes(["2", "0", "2"])
    assert names == ["0", "1", "2"]
    assert targets.tolist() == [2, 0, 2]
    assert number_classes(["-1", "1"])[1].tolist() == [-1, 1], "which check_data reports"
    names, targets = number_classes(["dog", "cat", "dog"])
    assert names == ["cat", "dog"]
    assert targets.tolist() == [1, 0, 1]


def test_cache_that_does_not_fit_is_refused(archive, monkeypatch):
    monkeypatch.setattr("data.loading.shared_memory.free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="CACHE_MODE.*needs 0.00 GB"):
        ZipSource(archive, "train", cache_mode="full", as_array=True)


def test_processes_of_a_machine_share_its_memory(archive, monkeypatch):
    stored = (archive / "train.zip").stat().st_size
    monkeypatch.setattr("data.loading.shared_memory.free_memory", lambda: 2 * stored)
    ZipSource(archive, "train", cache_mode="full", as_array=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="for each process"):
        ZipSource(archive, "train", cache_mode="full", as_array=True)


# --- data sets that other libraries bring ---


def test_digits_are_split_by_class_without_overlap():
    parts = [build_dataset(data_config(DATA__DATASET="digits"), is_train=is_train) for is_train in (True, False)]
    assert [len(part) for part in parts] == [1438, 359]
    assert parts[0].classes == [str(digit) for digit in range(10)]
    counts = np.bincount(load_digits().target)
    assert np.bincount(parts[1].targets).tolist() == [round(0.2 * count) for count in counts]
    seen = {image.tobytes() for part in parts for image in part.source.images}
    assert len(seen) > 1780, "a few digits may be equal, but the parts must not repeat each other"
    assert parts[0].source.images.shape[1:] == (32, 32, 3)
    assert parts[1].sample_name(17) == "digits[17]"
    held_out = hashlib.sha256(parts[1].targets.tobytes()).hexdigest()
    assert held_out.startswith("de405bf71a17eec8"), "the hold-out must never change"


class FakeCifar:
    """Stands for torchvision's class: files exist once somebody has downloaded them."""

    def __init__(self, root, train, download):
        marker = root + "/downloaded"
        if download:
            open(marker, "a").close()
        try:
            open(marker).close()
        except FileNotFoundError:
            raise RuntimeError("Dataset not found or corrupted.") from None
        count = 20 if train else 10
        self.data = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = [n % 10 for n in range(count)]
        self.classes = [f"class {n}" for n in range(10)]


@pytest.mark.parametrize("name", ("CIFAR10", "CIFAR100"))
def test_cifar_is_downloaded_only_if_allowed(tmp_path, monkeypatch, name):
    monkeypatch.setattr(builtin.torchvision_datasets, name, FakeCifar)
    keys = {"DATA__DATASET": name, "DATA__DATA_PATH": tmp_path, "DATA__IMG_SIZE": 32}
    with pytest.raises(FileNotFoundError, match=r"DATA\.DOWNLOAD"):
        build_dataset(data_config(DATA__DOWNLOAD=False, **keys), is_train=True)
    dataset = build_dataset(data_config(**keys), is_train=False)
    assert (len(dataset), len(dataset.classes)) == (10, 10)
    image, target, index = dataset[3]
    assert np.array_equal(image, dataset.source.images[3])
    assert (target, index) == (3, 3)
    assert len(build_dataset(data_config(DATA__DOWNLOAD=False, **keys), is_train=True)) == 20


def test_failed_download_names_the_target(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(builtin.torchvision_datasets, "CIFAR10", fail)
    config = data_config(DATA__DATASET="CIFAR10", DATA__DATA_PATH=tmp_path)
    with pytest.raises(
        RuntimeError, match=f"download of CIFAR10 to {tmp_path} failed: no route to host; .* fetched elsewhere"
    ):
        build_dataset(config, is_train=True)
