"""Checks of the data against the configuration, before training starts."""

from collections.abc import Sequence

import numpy as np
from PIL import ImageFile
from yacs.config import CfgNode

from data.dataset import ImageDataset
from utils.runtime import get_world_size

_SHOWN = 5  # names in a message


def check_data(
    config: CfgNode,
    train_dataset: ImageDataset | None,
    val_dataset: ImageDataset | None,
    *,
    subset: bool = False,
) -> None:
    """Compare the data sets with each other and with the configuration; None leaves one out.

    ``subset``: the data hold a part of the model's classes on purpose, so their number is not compared.

    Raises:
        ValueError: lists every problem found: labels or number of classes that do not fit MODEL.NUM_CLASSES, hidden or
            empty class folders, class lists of train and val that differ, a batch larger than the training set.
    """
    problems = []
    for part, dataset in (("train", train_dataset), ("val", val_dataset)):
        if dataset is not None:
            problems += [f"{part}: {problem}" for problem in _class_problems(config, dataset, subset=subset)]
    if train_dataset is not None and val_dataset is not None:
        problems += _difference_problems(train_dataset.classes, val_dataset.classes)
    if train_dataset is not None:
        problems += _batch_problems(config, len(train_dataset))
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        problems.append("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: truncated images would be used silently")
    if problems:
        where = f"DATA.DATASET {config.DATA.DATASET!r}, DATA.DATA_PATH {config.DATA.DATA_PATH!r}"
        raise ValueError(f"the data cannot be used ({where}):\n" + "\n".join(f"  - {problem}" for problem in problems))


def _class_problems(config: CfgNode, dataset: ImageDataset, *, subset: bool) -> list[str]:
    problems = []
    classes, targets = dataset.classes, dataset.targets
    if len(classes) != config.MODEL.NUM_CLASSES and not subset:
        problems.append(
            f"{len(classes)} classes ({_some(classes)}), but MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}; "
            f"set MODEL.NUM_CLASSES {len(classes)} or give another DATA.DATA_PATH"
        )
    hidden = [name for name in classes if name.startswith(".")]
    if hidden:
        problems.append(f"hidden folders count as classes: {_some(hidden)}; remove them")
    outside = np.flatnonzero((targets < 0) | (targets >= len(classes)))
    if len(outside):
        first = int(outside[0])
        problems.append(
            f"{len(outside)} labels are outside 0..{len(classes) - 1}, the first is {int(targets[first])} of "
            f"{dataset.sample_name(first)}"
        )
    inside = targets[(targets >= 0) & (targets < len(classes))]
    empty = np.flatnonzero(np.bincount(inside, minlength=len(classes)) == 0)
    if len(empty):
        problems.append(f"{len(empty)} classes have no images: {_some([classes[i] for i in empty])}")
    return problems


def _difference_problems(train: Sequence[str], val: Sequence[str]) -> list[str]:
    if list(train) == list(val):
        return []
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    parts = [f"only in {part}: {_some(names)}" for part, names in (("train", only_train), ("val", only_val)) if names]
    return [f"train and val have different classes, so their labels differ ({'; '.join(parts) or 'another order'})"]


def _batch_problems(config: CfgNode, num_samples: int) -> list[str]:
    batch, world_size = config.DATA.BATCH_SIZE, get_world_size()
    if batch > num_samples:
        return [f"DATA.BATCH_SIZE {batch} is larger than the {num_samples} training images"]
    if batch * world_size > num_samples:
        return [
            f"one batch of all {world_size} processes takes {batch * world_size} images (DATA.BATCH_SIZE {batch}), but "
            f"there are {num_samples} training images"
        ]
    return []


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ... ({len(names)} in all)"
