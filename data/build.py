"""From the configuration to data sets and loaders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from yacs.config import CfgNode

from data.dataset import ImageDataset
from data.images.transforms import build_transform
from data.loading.loader import ImageLoader
from data.loading.samplers import EvalShardSampler, TrainSampler
from data.sources.base import ArraySource, FileSource, FolderSource, Source
from data.sources.builtin import cifar_source, digits_source
from data.sources.cached import (
    DecodedSource,
    FinishedSource,
    ScalableSource,
    finished_file,
    is_finished,
    write_finished,
)
from data.sources.classes import order_classes
from data.sources.csv import CsvSource, csv_classes
from data.sources.holdout import hold_out, keep_share
from data.sources.layout import check_layout
from data.sources.listing import class_folders
from data.sources.shards import ShardSource, part_of
from data.sources.timm_reader import PREFIX, timm_source
from data.sources.zip import ZipSource
from utils.config import CIFAR_DATASETS, as_pair
from utils.runtime import get_rank, get_world_size, once_per_machine, usable_cores

_WRITE_BATCH = 64  # images


def build_train_loader(
    config: CfgNode, *, device: torch.device | str, dataset: ImageDataset | None = None
) -> ImageLoader:
    """Return the training loader of this process; of ``dataset``, if it was built before.

    It yields (images, targets, indices): images uint8 (B, C, H, W) in channels-last memory (fast pipeline) or
    normalised float (reference pipeline), int64 labels and sample indices (B,). ``loader.sampler`` is a TrainSampler:
    call its ``set_progress`` before each epoch. It gives whole batches only.
    """
    if dataset is None:
        dataset = build_dataset(config, is_train=True)
    batch_size = config.DATA.BATCH_SIZE
    sampler = TrainSampler(
        len(dataset),
        batch_size=batch_size,
        seed=config.SEED,
        rank=get_rank(),
        world_size=get_world_size(),
        repeats=config.AUG.REPEATS,
        balance=dataset.targets if config.DATA.SAMPLER == "balanced" else None,
    )
    return _build_loader(config, dataset, sampler, batch_size=batch_size, device=device)


def build_val_loader(
    config: CfgNode,
    *,
    device: torch.device | str,
    of_train: bool = False,
    part: str = "val",
    dataset: ImageDataset | None = None,
) -> ImageLoader:
    """Return this process's share of the validation set, in order, without padding; batches as in training.

    Of the training set only the class names are looked at, if it is there. ``len(loader.dataset)`` counts the whole
    validation set. ``of_train``: the training set instead, prepared as for evaluation. ``part``: name of the validation
    set's folder, CSV file or archive. ``dataset``: the data set, if it was built before.
    """
    if dataset is None:
        dataset = build_dataset(config, is_train=of_train, augment=False, part=part)
    sampler = EvalShardSampler(len(dataset), rank=get_rank(), world_size=get_world_size())
    batch_size = config.TEST.BATCH_SIZE or config.DATA.BATCH_SIZE
    return _build_loader(config, dataset, sampler, batch_size=batch_size, device=device)


def build_dataset(config: CfgNode, *, is_train: bool, augment: bool = True, part: str = "val") -> ImageDataset:
    """Return the training or the validation data set of the configuration.

    Args:
        config: the configuration.
        is_train: which of the two.
        augment: prepare training images for training; False: as for evaluation.
        part: name of the folder, CSV file or archive of the validation set.

    Raises:
        ValueError: no DATA.DATA_PATH for a data set that needs it.
        FileNotFoundError: files are missing; names them, and what to do where other data are there.
        RuntimeError: a download or the validation cache failed; on all processes alike.
    """
    source = _build_source(config, "train" if is_train else part)
    if is_train and config.DATA.TRAIN_SHARE < 1:
        keep_share(source, config)
    if config.DATA.CACHE_DECODED == "ram" and not isinstance(source, ArraySource):
        source = DecodedSource(source)
    elif config.DATA.FAST_RESIZE and source.channels == 3 and not isinstance(source, ArraySource):
        source = ScalableSource(source)
    transform = build_transform(config, is_train=is_train and augment)
    skip_bad = config.DATA.BAD_IMAGES == "skip"
    dataset = ImageDataset(source, transform, seed=config.SEED, skip_bad=skip_bad)
    if config.DATA.VAL_CACHE and not is_train:
        source = _finished_source(dataset, Path(config.DATA.VAL_CACHE))
        dataset = ImageDataset(source, np.asarray, seed=config.SEED)
    return dataset


def _build_source(config: CfgNode, part: str) -> Source:
    data, is_train = config.DATA, part == "train"
    images = {"as_array": data.PIPELINE == "fast", "channels": config.MODEL.STRIP_MLP.IN_CHANS}
    if data.DATASET == "digits":
        return digits_source(is_train=is_train, **images)
    if data.DATASET.startswith(PREFIX):
        return timm_source(config, part, **images)
    if not data.DATA_PATH:
        raise ValueError(f"DATA.DATASET {data.DATASET!r} needs DATA.DATA_PATH (--data-path): where are the images?")
    if not data.HOLDOUT:
        check_layout(data.DATA_PATH, data.DATASET, zip_mode=data.ZIP_MODE, part=part)
    if data.DATASET in CIFAR_DATASETS:
        return cifar_source(data.DATASET, data.DATA_PATH, is_train=is_train, download=data.DOWNLOAD, **images)
    if data.ZIP_MODE:
        source = ZipSource(data.DATA_PATH, part, cache_mode=data.CACHE_MODE, **images)
    elif data.DATASET == "shards":
        source = ShardSource(part_of(data.DATA_PATH, part), **images)
    else:
        source = _file_source(config, part, **images)
    root = Path(data.DATA_PATH)
    order_classes(source, data.CLASS_ORDER, root.parent if root.is_file() else root)
    if data.HOLDOUT:
        hold_out(source, config, is_train=is_train)
    return source


def _file_source(config: CfgNode, part: str, **images: Any) -> FileSource:
    """Return the images of a folder or a CSV file; of all parts where one is to be held out."""
    root, holdout = Path(config.DATA.DATA_PATH), config.DATA.HOLDOUT
    is_csv = config.DATA.DATASET == "csv"
    known = root / ("val.csv" if is_csv else "val")
    if holdout and known.exists():
        raise ValueError(
            f"DATA.HOLDOUT is {holdout:g}, but there is {known}: set DATA.HOLDOUT 0 to validate on it, or move it away "
            "to hold out a part of the training images"
        )
    if is_csv:
        train = root if root.is_file() and holdout else root / "train.csv"
        file = train if holdout else root / f"{part}.csv"
        return CsvSource(file, classes=_of_train(part, csv_classes, train), **images)
    if root.is_file():
        raise FileNotFoundError(f"DATA.DATA_PATH {root} is a file, not a folder; to read a CSV file: --dataset csv")
    train = root / "train"
    if holdout:
        return FolderSource(train if train.is_dir() else root, **images)
    return FolderSource(root / part, classes=_of_train(part, class_folders, train), **images)


def _of_train(part: str, classes_of: Callable[[Path], list[str]], train: Path) -> list[str]:
    """Return the classes of the training set for the validation set, which may lack some of them."""
    return classes_of(train) if part == "val" else []


def _finished_source(dataset: ImageDataset, folder: Path) -> FinishedSource:
    """Return the source of the transformed images of ``dataset``; one process of each machine writes them if need be.

    Raises:
        RuntimeError: the file could not be written, or an image could not be read; on all processes alike.
    """
    shape = (len(dataset), *as_pair(dataset.transform.size), dataset.source.channels)
    file = finished_file(folder, dataset.source, dataset.transform)

    def write_if_missing() -> None:
        if is_finished(file, shape):
            return
        loader = ImageLoader(dataset, batch_size=_WRITE_BATCH, num_workers=usable_cores(shared=False))
        try:
            write_finished(file, loader, shape)
        finally:
            loader.close()

    once_per_machine(write_if_missing, what=f"writing the validation cache {file}")
    return FinishedSource(dataset.source, file)


def _build_loader(
    config: CfgNode,
    dataset: ImageDataset,
    sampler: Sampler,
    *,
    batch_size: int,
    device: torch.device | str,
) -> ImageLoader:
    num_workers = usable_cores() if config.DATA.NUM_WORKERS < 0 else config.DATA.NUM_WORKERS
    return ImageLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=config.DATA.PIN_MEMORY and torch.device(device).type == "cuda",
        timeout=config.DATA.LOADER_TIMEOUT if num_workers else 0,
    )
