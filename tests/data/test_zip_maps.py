"""Map files of archives as people and other systems write them: read alike, or refused with file, line and remedy."""

import logging
import subprocess
import unicodedata
import zipfile

import pytest

from data import build_dataset, check_data
from data.sources.base import FolderSource
from data.sources.zip import ZipSource, number_classes, read_map
from tests.builders import data_config
from tests.images import write_folder

CLASSES = ("bee", "caf\u00e9", "dog")


@pytest.fixture
def root(tmp_path):
    """Folder with train/ and val/, and both as archives with maps of class numbers."""
    for part, count in (("train", 3), ("val", 2)):
        write_folder(tmp_path / part, CLASSES, count)
        pack(tmp_path, part)
    return tmp_path


def pack(root, part, rename=str):
    """Write an archive of a folder and its map; ``rename`` changes the names in the archive."""
    source = FolderSource(root / part, as_array=True)
    with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
        for index in range(len(source.targets)):
            name = source.name(index).removeprefix(f"{root}/{part}/")
            archive.writestr(rename(name), source.read(index))
    write_map(root, part, "\n".join)


def write_map(root, part, make, encoding="utf-8"):
    """Write the map of a part: ``make`` gets its lines and returns the text."""
    source = FolderSource(root / part, as_array=True)
    names = [source.name(index).removeprefix(f"{root}/{part}/") for index in range(len(source.targets))]
    lines = [f"{name}\t{label}" for name, label in zip(names, source.targets, strict=True)]
    (root / f"{part}_map.txt").write_bytes(make(lines).encode(encoding))


def zip_source(root, part="train"):
    return build_dataset(data_config(DATA__DATA_PATH=root, DATA__ZIP_MODE=True), is_train=part == "train").source


READABLE = {
    "CRLF": ("\r\n".join, "utf-8"),
    "CR": ("\r".join, "utf-8"),
    "mark": ("\r\n".join, "utf-8-sig"),
    "UTF-16": ("\r\n".join, "utf-16"),
    "UTF-16, big end first": (lambda lines: "\ufeff" + "\r\n".join(lines), "utf-16-be"),
    "backslashes": (lambda lines: "\n".join(lines).replace("/", "\\"), "utf-8"),
    "current folder": (lambda lines: "\n".join(f"./{line}" for line in lines), "utf-8"),
    "blanks": (lambda lines: "\n\n".join(line.replace("\t", " \t ") + "  " for line in lines) + "\n", "utf-8"),
    "decomposed": (lambda lines: unicodedata.normalize("NFD", "\n".join(lines)), "utf-8"),
    "decimals": (lambda lines: "\n".join(f"{line}.0" for line in lines), "utf-8"),
}


@pytest.mark.parametrize("make", READABLE.values(), ids=READABLE)
def test_maps_that_mean_the_same(root, make):
    expected = FolderSource(root / "train", as_array=True)
    write_map(root, "train", *make)
    source = zip_source(root)
    assert source.classes == expected.classes
    assert source.targets.tolist() == expected.targets.tolist()
    assert [source.read(index) for index in range(9)] == [expected.read(index) for index in range(9)]
    assert source.name(0) == f"{root}/train.zip@/bee/0.jpg"


REFUSED = {
    "Latin-1": (lambda lines: "\n".join(lines), "latin-1", r"line 4: not utf-8 text.*iconv"),
    "UTF-16 without mark": (lambda lines: "\n".join(lines), "utf-16-le", r"line 1: not utf-8 text .*-f utf-16le"),
    "spaces": (lambda lines: "\n".join(lines).replace("\t", " "), "utf-8", r"line 1: expected 'path<TAB>class'.*sed "),
    "comma": (lambda lines: "\n".join(lines).replace("\t", ","), "utf-8", r"line 1: expected 'path<TAB>class'.*sed "),
    "header": (lambda lines: "\n".join(["file\tlabel", *lines]), "utf-8", r"line 1: 'file'; is it a header\?"),
    "prefix": (lambda lines: "\n".join("x/" + line for line in lines), "utf-8", r"line 1: .*such as 'bee/0.jpg'"),
    "one stranger": (lambda lines: "\n".join([*lines, "", "bee/9.jpg\t0"]), "utf-8", r"line 11: 'bee/9.jpg'"),
    "empty": (lambda lines: "\n \n", "utf-8", "lists no images"),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_other_maps_are_refused_with_file_line_and_remedy(root, make):
    *make, message = make
    write_map(root, "train", *make)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as info:
        zip_source(root)
    assert str(root / "train_map.txt") in str(info.value)


def test_the_remedy_for_another_separator_works(root):
    write_map(root, "train", lambda lines: "\n".join(lines).replace("\t", ",  "))
    with pytest.raises(ValueError, match="sed") as info:
        zip_source(root)
    subprocess.run(str(info.value)[str(info.value).index("sed ") :], shell=True, check=True)
    assert zip_source(root).classes == list(CLASSES)


def test_names_with_unusual_characters_are_one_line(tmp_path):
    (tmp_path / "map.txt").write_text("a\u2028b\x0c c, d.jpg\t0\n", encoding="utf-8")
    assert read_map(tmp_path / "map.txt").paths == ["a\u2028b\x0c c, d.jpg"]


def test_archive_with_backslashes(root):
    pack(root, "train", rename=lambda name: name.replace("/", "\\"))
    source = zip_source(root)
    assert source.classes == list(CLASSES)
    assert source.name(0).endswith("bee/0.jpg")


def test_images_that_the_map_leaves_out_or_repeats_are_counted(root, caplog):
    write_map(root, "train", lambda lines: "\n".join([*lines[:-2], lines[0]]))
    with caplog.at_level(logging.WARNING):
        assert len(zip_source(root).targets) == 8
    assert "2 files were not taken" in caplog.text
    assert "lists 1 files more than once" in caplog.text


# --- names of numbered classes ---


def test_names_of_numbered_classes_are_their_folders():
    paths = ["train/b/x/0.jpg", "train/a/1.jpg", "train/b/2.jpg"]
    assert number_classes(["0", "1", "0"], paths)[0] == ["b", "a"]
    assert number_classes(["0", "2", "0"], paths)[0] == ["b", "1", "a"], "a class without images has its number"
    assert number_classes(["0", "1", "2"], paths)[0] == ["0", "1", "2"], "a folder of two classes names none"
    assert number_classes(["0", "0", "0"], paths)[0] == ["train"]
    assert number_classes(["0", "1"], ["0.jpg", "1.jpg"])[0] == ["0", "1"]
    assert number_classes(["-1", "1", "-1"], paths)[0] == ["0", "1"]


def test_classes_of_archive_and_folder_are_the_same(root):
    folder = build_dataset(data_config(DATA__DATA_PATH=root), is_train=False)
    assert zip_source(root, "val").classes == folder.classes == zip_source(root).classes


def test_val_without_folders_has_the_names_of_train(root):
    """As ImageNet's validation images come."""
    write_map(root, "val", lambda lines: "\n".join(lines).replace("/", "_"))
    with zipfile.ZipFile(root / "val.zip") as archive:
        contents = {name.replace("/", "_"): archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(root / "val.zip", "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    source = zip_source(root, "val")
    assert source.classes == list(CLASSES)
    assert source.targets.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("named", (False, True))
def test_val_may_lack_a_class(root, named):
    def use_names(lines):
        return "\n".join(line.rpartition("\t")[0] + "\t" + line.partition("/")[0] for line in lines)

    make = use_names if named else "\n".join
    write_map(root, "train", make)
    write_map(root, "val", lambda lines: make([line for line in lines if not line.startswith("caf")]))
    config = data_config(DATA__DATA_PATH=root, DATA__ZIP_MODE=True)
    train, val = (build_dataset(config, is_train=is_train) for is_train in (True, False))
    assert val.classes == train.classes == list(CLASSES)
    assert val.targets.tolist() == [0, 0, 2, 2]
    check_data(config, train, val)


def test_val_of_other_classes_keeps_them(root):
    write_folder(root / "other" / "val", ("ant", "dog"))
    pack(root / "other", "val")
    for name in ("train.zip", "train_map.txt"):
        (root / "other" / name).write_bytes((root / name).read_bytes())
    assert ZipSource(root / "other", "val", cache_mode="no", as_array=True).classes == ["ant", "dog"]
