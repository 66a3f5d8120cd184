"""Which label a class gets: DATA.CLASS_ORDER."""

from pathlib import Path

import pytest

from data.build import build_dataset
from tests.builders import data_config
from tests.images import write_splits

NUMBERS = tuple(map(str, range(11)))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("numbers"), NUMBERS, train=1, val=1)


def labels(folder: Path, order: str) -> tuple[list[str], list[bool]]:
    """Return the class names, and for each image whether its label is the number of its folder's name there."""
    config = data_config(DATA__DATA_PATH=folder, DATA__CLASS_ORDER=order, MODEL__NUM_CLASSES=11)
    dataset = build_dataset(config, is_train=False)
    folders = [Path(dataset.sample_name(index)).parent.name for index in range(len(dataset))]
    right = [dataset.classes[label] == name for label, name in zip(dataset.targets, folders, strict=True)]
    return list(dataset.classes), right


def test_text_and_numeric_order(numbered: Path) -> None:
    for order, expected in (("text", sorted(NUMBERS)), ("numeric", list(NUMBERS))):
        classes, right = labels(numbered, order)
        assert classes == expected
        assert all(right)


def test_order_of_a_file_which_may_name_more(numbered: Path) -> None:
    names = ["further", *reversed(NUMBERS)]
    (numbered / "classes.txt").write_text("\n".join(names) + "\n\n")
    classes, right = labels(numbered, "file")
    assert classes == names
    assert all(right)


@pytest.mark.parametrize(
    ("text", "message"),
    (("0\n1\n", "does not list the class '10'"), ("\n".join((*NUMBERS, "3")), "lists a class twice")),
)
def test_a_file_that_does_not_fit(numbered: Path, text: str, message: str) -> None:
    (numbered / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        labels(numbered, "file")


def test_an_order_that_is_not_possible(tmp_path: Path) -> None:
    write_splits(tmp_path, train=1, val=1)
    with pytest.raises(ValueError, match="CLASS_ORDER is numeric, but the class 'cat' is not a number"):
        labels(tmp_path, "numeric")
    with pytest.raises(FileNotFoundError, match=r"no .*classes\.txt \(one class name per line\)"):
        labels(tmp_path, "file")
