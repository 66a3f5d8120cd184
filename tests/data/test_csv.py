"""Images listed in a CSV file: what is read, and one readable error for each thing that is wrong."""

from pathlib import Path

import pytest

from data import check_data
from data.build import build_dataset
from tests.builders import data_config
from tests.images import CLASSES, write_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("csv"), count=3)


def listed(root: Path, text: str | bytes, *, is_train: bool = True, **keys: object) -> list[tuple[str, str]]:
    """Write ``train.csv`` and return the data set's images as (path, class)."""
    (root / "train.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    config = data_config(DATA__DATASET="csv", DATA__DATA_PATH=root, **keys)
    dataset = build_dataset(config, is_train=is_train)
    assert dataset[0][0].shape == (40, 40, 3)
    names = [dataset.sample_name(index).removeprefix(f"{root}/") for index in range(len(dataset))]
    return [(name, dataset.classes[target]) for name, target in zip(names, dataset.targets, strict=True)]


TWO = [("dog/0.jpg", "a dog"), ("cat/1.jpg", "a, cat")]


@pytest.mark.parametrize(
    "text",
    (
        'path,label\ndog/0.jpg,a dog\ncat/1.jpg,"a, cat"\n',
        'label, path, width\na dog, dog/0.jpg, 3\n\n"a, cat", "cat/1.jpg", 4',
        "\ufeffPath;Label\r\ndog\\0.jpg;a dog\r\n./cat/1.jpg;a, cat\r\n",
        "path\tlabel\ndog/0.jpg\ta dog\ncat/1.jpg\ta, cat\n".encode("utf-16"),
    ),
)
def test_forms_that_spreadsheets_write(images: Path, text: str | bytes) -> None:
    assert listed(images, text) == TWO


def test_numbers_are_names_of_classes(images: Path) -> None:
    text = "path,label\ncat/0.jpg,10\ncat/1.jpg,9\n"
    assert listed(images, text) == [("cat/0.jpg", "10"), ("cat/1.jpg", "9")]
    assert listed(images, text, DATA__CLASS_ORDER="numeric") == [("cat/0.jpg", "10"), ("cat/1.jpg", "9")]


def test_validation_file_takes_the_training_classes(images: Path) -> None:
    train = "path,label\n" + "".join(f"{name}/0.jpg,{name}\n" for name in CLASSES)
    (images / "val.csv").write_text("path,label\nemu/1.jpg,emu\n")
    assert listed(images, train, is_train=False) == [("emu/1.jpg", "emu")]
    config = data_config(DATA__DATASET="csv", DATA__DATA_PATH=images)
    assert build_dataset(config, is_train=False).classes == list(CLASSES)
    (images / "val.csv").unlink()


def test_an_image_in_both_files_is_warned_about(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("train", "val"):
        (images / f"{part}.csv").write_text(f"path,label\ncat/0.jpg,cat\ndog/{len(part)}.jpg,dog\n")
    (images / "dog" / "5.jpg").write_bytes((images / "dog" / "0.jpg").read_bytes())
    (images / "dog" / "3.jpg").write_bytes((images / "dog" / "0.jpg").read_bytes())
    config = data_config(DATA__DATASET="csv", DATA__DATA_PATH=images, MODEL__NUM_CLASSES=0, DATA__BATCH_SIZE=2)
    check_data(config, *(build_dataset(config, is_train=is_train) for is_train in (True, False)))
    assert "1 of the 2 validation images are training images too" in caplog.text
    (images / "val.csv").unlink()


def test_decoded_images_are_the_same(images: Path) -> None:
    text = "path,label\nemu/1.jpg,emu\ncat/0.jpg,cat\n"
    assert listed(images, text, DATA__CACHE_DECODED="ram") == listed(images, text)


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("", r"train\.csv is empty; expected the header path,label"),
        ("path,label\n\n", "lists no images: there is no line after the header"),
        ("file,class\ncat/0.jpg,cat\n", "the first line is 'file,class', not the header path,label"),
        ("cat/0.jpg,cat\n", "the first line is 'cat/0.jpg,cat', not the header path,label"),
        ("path,label\ncat/0.jpg,cat\ncat/1.jpg\n", "line 3: no label in 'cat/1.jpg'"),
        ("path,label\n,cat\n", "line 2: no path in ',cat'"),
        ("path,label,path\ncat/0.jpg,cat,cat/1.jpg\n", "header 'path,label,path' names the column 'path' twice"),
        ("path,label\ncat/0.jpg,cat\n./cat/0.jpg,dog\n", "line 2 gives 'cat/0.jpg' the label 'cat', line 3 .*'dog'"),
        (
            "path,label\ncat/0.jpg,cat\ncat/9.jpg,cat\n",
            "1 images of 2 that are not there, the first in line 3: .*9",
        ),
        (b"path,label\ncat/0.jpg,caf\xe9\n", "line 2: not utf-8 text"),
        ('path,label\ncat/0.jpg,"cat\ncat/1.jpg,cat\n', "line 4: unexpected end of data; is a quote left open above"),
    ),
)
def test_what_is_wrong_is_named(images: Path, text: str | bytes, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        listed(images, text)


def test_an_image_has_one_name_whether_its_path_is_absolute_or_not(images: Path) -> None:
    assert listed(images, f'path,label\n{images / "dog/0.jpg"},a dog\ncat/1.jpg,"a, cat"\n') == TWO
    with pytest.raises(ValueError, match="line 2 gives 'cat/0.jpg' the label 'cat', line 3 the label 'dog'"):
        listed(images, f"path,label\ncat/0.jpg,cat\n{images / 'cat/0.jpg'},dog\n")


@pytest.mark.parametrize("share", (0.0, 0.2))
def test_a_csv_file_without_its_data_set_says_so(images: Path, share: float) -> None:
    (images / "list.csv").write_text("path,label\ncat/0.jpg,cat\n")
    with pytest.raises(FileNotFoundError, match=r"list\.csv is a file, not a folder; .*--dataset csv"):
        build_dataset(data_config(DATA__DATA_PATH=images / "list.csv", DATA__HOLDOUT=share), is_train=True)


def test_a_missing_file_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"needs train\.csv and val\.csv in DATA\.DATA_PATH, or with"):
        build_dataset(data_config(DATA__DATASET="csv", DATA__DATA_PATH=tmp_path), is_train=True)
    (tmp_path / "train.csv").write_text("path,label\n")
    with pytest.raises(FileNotFoundError, match=r"train\.csv is: use --dataset csv"):
        build_dataset(data_config(DATA__DATA_PATH=tmp_path), is_train=True)
