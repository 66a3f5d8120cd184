"""ImageNet-ReaL: accuracy under labels that list every class that is in an image.

Beyer et al., "Are we done with ImageNet?", 2020. Labels and reference code are in
github.com/google-research/reassessed-imagenet.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.runtime import all_reduce_sum

_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


class RealAccuracy:
    """Count hits under the ReaL labels; ``observe`` is an observer of ``evaluate``.

    Args:
        labels: of ``read_real_labels``.
        device: of the scores.
    """

    def __init__(self, labels: Tensor, device: torch.device) -> None:
        self._labels = labels.to(device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # hits, images with labels

    def observe(self, scores: Tensor, _targets: Tensor, indices: Tensor) -> None:
        """Count a batch: an image with labels is a hit if the class with the highest score is among them."""
        labels = self._labels[indices.to(self._labels.device)]
        hits = (labels == scores.argmax(dim=1, keepdim=True)).any(dim=1)
        self._counts += torch.stack([hits.sum(), (labels[:, 0] >= 0).sum()])

    def result(self) -> tuple[float, int]:
        """Return the accuracy in percent and the number of images that have labels, over all processes. Collective."""
        counts = self._counts.clone()
        all_reduce_sum(counts)
        hits, counted = counts.tolist()
        return 100.0 * hits / counted, counted


def read_real_labels(file: str | Path, names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Read the labels of the images ``names``.

    Args:
        file: real.json: a list with one list of class numbers for each validation image in the order of their names,
            ILSVRC2012_val_00000001.JPEG first. The classes are numbered in the order of their names.
        names: paths of the images of the data set, which has to be the whole validation set.
        classes: names of its classes, in the order of the labels.

    Returns:
        int64 (images, most labels of one image), filled up with -1.

    Raises:
        FileNotFoundError, ValueError: the file, or the data set, is not what it has to be.
    """
    lists = _read_lists(Path(file), len(classes))
    if len(lists) != len(names):
        raise ValueError(
            f"TEST.REAL_LABELS: {file} has labels of {len(lists)} images, but the data set has {len(names)}; it needs "
            "the whole ImageNet validation set"
        )
    if list(classes) != sorted(classes, key=int if all(map(str.isdecimal, classes)) else None):
        raise ValueError(
            "TEST.REAL_LABELS numbers the classes in the order of their names, but DATA.CLASS_ORDER gives another order"
        )
    numbers = [_image_number(name, len(names)) for name in names]
    if len(set(numbers)) != len(numbers):
        raise ValueError("TEST.REAL_LABELS: two images of the data set have the same number in their name")
    rows = [torch.tensor(lists[number - 1], dtype=torch.int64) for number in numbers]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _read_lists(file: Path, num_classes: int) -> list[list[int]]:
    if not file.is_file():
        raise FileNotFoundError(f"TEST.REAL_LABELS: no file {file}")
    try:
        lists = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"TEST.REAL_LABELS: {file} is not JSON: {error}") from None
    if not isinstance(lists, list) or not all(isinstance(labels, list) for labels in lists):
        raise ValueError(f"TEST.REAL_LABELS: {file} is not a list with one list of class numbers for each image")
    for number, labels in enumerate(lists, 1):
        wrong = [label for label in labels if type(label) is not int or not 0 <= label < num_classes]
        if wrong:
            raise ValueError(
                f"TEST.REAL_LABELS: {file} gives image {number} the class {wrong[0]!r}, but the data set has classes 0 "
                f"to {num_classes - 1}"
            )
    if not any(lists):
        raise ValueError(f"TEST.REAL_LABELS: {file} has no labels")
    return lists


def _image_number(name: str, count: int) -> int:
    match = _NAME.fullmatch(Path(name).name)
    if match is None or not 1 <= int(match[1]) <= count:
        raise ValueError(
            f"TEST.REAL_LABELS finds the labels of an image by its name, ILSVRC2012_val_00000001.JPEG to "
            f"ILSVRC2012_val_{count:08d}.JPEG, but the data set has {name}"
        )
    return int(match[1])
