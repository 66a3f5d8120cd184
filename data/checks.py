"""Checks of the data against the configuration, before training starts."""

import hashlib
import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import ImageFile
from yacs.config import CfgNode

from data.dataset import ImageDataset
from data.sources.listing import some
from utils.runtime import get_world_size, printable

logger = logging.getLogger(__name__)

_SHOWN_CLASSES = 10


def check_data(
    config: CfgNode,
    train_dataset: ImageDataset | None,
    val_dataset: ImageDataset | None,
    *,
    subset: bool = False,
    world_size: int | None = None,
) -> None:
    """Compare the data sets with each other and with the configuration; None leaves one out.

    A class without validation images is a warning. ``subset``: the data hold a part of the model's classes on purpose,
    so their number is not compared. ``world_size``: processes that share a batch of all; None: those of this run.

    Raises:
        ValueError: lists every problem found: labels or number of classes that do not fit MODEL.NUM_CLASSES, classes
            without training images, class lists of train and val that differ, a batch larger than the training set.
    """
    problems = []
    for part, dataset in (("train", train_dataset), ("val", val_dataset)):
        if dataset is not None:
            found = _class_problems(config, dataset, may_lack_classes=part == "val", subset=subset)
            problems += [f"{part}: {problem}" for problem in found]
    if train_dataset is not None and val_dataset is not None:
        problems += _difference_problems(train_dataset.classes, val_dataset.classes)
        if config.DATA.DATASET == "csv" or config.DATA.DATASET.startswith("timm:"):
            _warn_of_shared_images(train_dataset, val_dataset)
    if train_dataset is not None:
        problems += _batch_problems(config, len(train_dataset), world_size or get_world_size())
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        problems.append("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: truncated images would be used silently")
    if problems:
        where = f"DATA.DATASET {config.DATA.DATASET!r}, DATA.DATA_PATH {config.DATA.DATA_PATH!r}"
        raise ValueError(f"the data cannot be used ({where}):\n" + "\n".join(f"  - {problem}" for problem in problems))


def data_facts(config: CfgNode, **parts: ImageDataset) -> dict[str, Any]:
    """Return what tells two copies of the data apart: classes, images per class, and the lists of images with labels.

    Images are known by their path below ``DATA.DATA_PATH``; they are not opened.

    Args:
        config: frozen config.
        parts: the data sets by their names.
    """
    facts: dict[str, Any] = {}
    root = config.DATA.DATA_PATH
    for part, dataset in parts.items():
        facts[f"{part}: images"] = len(dataset)
        facts |= {f"{part}: class {label}": name for label, name in enumerate(dataset.classes)}
        counts = np.bincount(dataset.targets, minlength=len(dataset.classes)).tolist()
        facts |= {f"{part}: images of {name!r}": count for name, count in zip(dataset.classes, counts, strict=True)}
        digest = hashlib.sha256(dataset.targets.tobytes())
        for index in range(len(dataset)):
            digest.update(dataset.sample_name(index).removeprefix(root).encode(errors="surrogateescape") + b"\0")
        facts[f"{part}: list of images (SHA-256)"] = digest.hexdigest()[:12]
    return facts


def _warn_of_shared_images(train: ImageDataset, val: ImageDataset) -> None:
    """Warn where images are for training and for validation, which lists of files, and splits of timm, can be."""
    names = {train.sample_name(index) for index in range(len(train))}
    shared = [name for name in map(val.sample_name, range(len(val))) if name in names]
    if shared:
        logger.warning(
            "%d of the %d validation images are training images too (%s): the results will look too good",
            len(shared),
            len(val),
            some(shared),
        )


def describe_classes(dataset: ImageDataset) -> str:
    """Return how many images each class has, for the log; of many classes, the smallest and the largest."""
    counts = np.bincount(dataset.targets, minlength=len(dataset.classes))
    order = np.argsort(-counts, kind="stable").tolist()
    shown = [f"{printable(dataset.classes[label])} {counts[label]}" for label in order]
    if len(shown) > _SHOWN_CLASSES:
        median = f"... (median {np.median(counts):g}) ..."
        shown = [*shown[: _SHOWN_CLASSES // 2], median, *shown[-(_SHOWN_CLASSES // 2) :]]
    return ", ".join(shown)


def _class_problems(config: CfgNode, dataset: ImageDataset, *, may_lack_classes: bool, subset: bool) -> list[str]:
    problems = []
    classes, targets = dataset.classes, dataset.targets
    if config.MODEL.NUM_CLASSES not in (0, len(classes)) and not subset:
        problems.append(
            f"{len(classes)} classes ({some(classes)}), but MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}; "
            f"set MODEL.NUM_CLASSES {len(classes)}, or 0 for the number of the data, or give another DATA.DATA_PATH"
        )
    if len(classes) < 2 and not subset:
        problems.append(
            f"there is one class, {classes[0]!r}; a classifier needs at least two: a folder, or label, for each"
        )
    composed = Counter(map(_composed, classes))
    twice = [name for name in classes if composed[_composed(name)] > 1]
    if twice:
        problems.append(
            f"classes whose names look alike, in other Unicode characters: {', '.join(map(ascii, twice[:4]))}; "
            "move their images into one folder"
        )
    outside = np.flatnonzero((targets < 0) | (targets >= len(classes)))
    if len(outside):
        first, are = int(outside[0]), "label is" if len(outside) == 1 else "labels are"
        problems.append(
            f"{len(outside)} {are} outside 0..{len(classes) - 1}, the first is {int(targets[first])} of "
            f"{printable(dataset.sample_name(first))}"
        )
    inside = targets[(targets >= 0) & (targets < len(classes))]
    empty = np.flatnonzero(np.bincount(inside, minlength=len(classes)) == 0)
    if len(empty):
        have, them = ("1 class has", "it") if len(empty) == 1 else (f"{len(empty)} classes have", "them")
        text = f"{have} no images: {some(classes[i] for i in empty)}"
        if may_lack_classes:
            logger.warning("val: %s; the results say nothing about %s", text, them)
        else:
            problems.append(text)
    return problems


def _difference_problems(train: Sequence[str], val: Sequence[str]) -> list[str]:
    if list(train) == list(val):
        return []
    spellings = {_composed(name): name for name in train}
    alike = [(spellings[_composed(name)], name) for name in val if spellings.get(_composed(name), name) != name]
    if alike:
        shown = ", ".join(f"{ascii(a)} in train and {ascii(b)} in val" for a, b in alike[:3])
        return [
            f"{len(alike)} class names are spelled with other Unicode characters in train and val, although they look "
            f"alike: {shown}; rename the folders of one of them (convmv -f utf8 -t utf8 --nfc -r --notest FOLDER)"
        ]
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    parts = [f"only in {part}: {some(names)}" for part, names in (("train", only_train), ("val", only_val)) if names]
    return [
        f"train and val have different classes, so their labels differ ({'; '.join(parts) or 'another order'}); train "
        "needs images of each class of val"
    ]


def _composed(name: str) -> str:
    """Return a name in the form (NFC) that macOS, unlike other systems, takes apart."""
    return unicodedata.normalize("NFC", name)


def _batch_problems(config: CfgNode, num_samples: int, world_size: int) -> list[str]:
    batch = config.DATA.BATCH_SIZE
    if batch > num_samples:
        return [f"DATA.BATCH_SIZE {batch} is larger than the {num_samples} training images; take at most {num_samples}"]
    if batch * world_size > num_samples:
        return [
            f"one batch of all {world_size} processes takes {batch * world_size} images (DATA.BATCH_SIZE {batch}), but "
            f"there are {num_samples} training images; take a smaller batch or fewer processes"
        ]
    return []
