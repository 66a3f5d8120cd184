"""The data sets by name, and one sample of them: load, augment under its own seed, name it in every error."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from yacs.config import CfgNode

from data.images.transforms import Transform, build_transform
from data.loading.collate import Sample
from data.sources.base import ArraySource, FolderSource, Source
from data.sources.builtin import cifar_source, digits_source
from data.sources.cached import DecodedSource, FinishedSource
from data.sources.zip import ZipSource
from utils.errors import ImageReadError
from utils.runtime import integer_seed, seed_streams, streams_restored

logger = logging.getLogger(__name__)

FOLDER_DATASETS = ("imagenet", "imagenet-1k", "101_ObjectCategories", "caltech101", "folder")
CIFAR_DATASETS = ("CIFAR10", "CIFAR100")
DATASETS = (*FOLDER_DATASETS, *CIFAR_DATASETS, "digits")

_REPLACEMENT_TRIES = 20
_MIN_BAD_ALLOWED = 10
_MAX_BAD_SHARE = 0.01

SampleKey = int | tuple[int, int]  # index (evaluation), or (epoch, index) (training)


class ImageDataset(Dataset):
    """Images of a source, transformed, with label and index.

    A key ``(epoch, index)`` seeds Python's, numpy's and torch's streams from ``(seed, epoch, index)`` before loading
    and transforming, and puts them back afterwards; a plain index, for evaluation, leaves them alone.

    Args:
        source: where the images come from.
        transform: picture -> uint8 array (H, W, 3), or float tensor (3, H, W) in the reference pipeline.
        seed: seed of the run.
        skip_bad: replace images that cannot be read by another sample of the same epoch (training only), which
            depends on the key only. They are logged, and remembered in ``bad_indices``.

    Attributes:
        classes: class names, in the order of the labels.
        targets: int64 array (N,).
    """

    def __init__(self, source: Source, transform: Transform, *, seed: int, skip_bad: bool = False) -> None:
        self.source = source
        self.transform = transform
        self.classes = source.classes
        self.targets = source.targets
        self._seed = seed
        # one flag per image, in memory that the data workers share with the main process
        self._bad = torch.zeros(len(source.targets), dtype=torch.bool).share_memory_() if skip_bad else None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Return (image, target, index). ``index`` is that of the replacement where a bad image was skipped.

        Raises:
            ImageReadError: the image cannot be read; names path, index and class.
            RuntimeError: the transform failed on it; names them too.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Sample]:
        """Return the samples of several keys: what DataLoader calls for a batch."""
        if not isinstance(keys[0], tuple):
            return [self._get(int(key)) for key in keys]
        with streams_restored():  # once a batch: it takes longer than to seed
            return [self._get_seeded(*key) for key in keys]

    def sample_name(self, index: int) -> str:
        """Path of image ``index``, or a name such as ``digits[17]``."""
        return self.source.name(index)

    def describe(self, index: int) -> str:
        """Path, index and class of an image, for messages."""
        target = int(self.targets[index])
        name = repr(self.classes[target]) if 0 <= target < len(self.classes) else f"label {target}"
        return f"{self.sample_name(index)} (index {index}, class {name})"

    def bad_indices(self) -> list[int]:
        """Indices of the unreadable images met so far by this process and its workers."""
        return [] if self._bad is None else self._bad.nonzero().flatten().tolist()

    def _get_seeded(self, epoch: int, wanted: int) -> Sample:
        index = wanted
        for attempt in range(_REPLACEMENT_TRIES):
            seed_streams(self._seed, epoch, index)
            try:
                return self._get(index)
            except ImageReadError as error:
                if self._bad is None:
                    raise ImageReadError(f"{error}; DATA.BAD_IMAGES skip trains without them") from error
                self._note_bad(index, error)
            index = integer_seed(self._seed, epoch, wanted, attempt) % len(self)
        raise ImageReadError(f"{_REPLACEMENT_TRIES} images in a row could not be read, last {self.describe(index)}")

    def _get(self, index: int) -> Sample:
        try:
            image = self.transform(self.source.load(index))
        except ImageReadError as error:
            raise ImageReadError(
                f"cannot read image {self.describe(index)}: {error}. tools/check_data.py lists all such files"
            ) from error
        except Exception as error:
            raise RuntimeError(
                f"the transform failed on {self.describe(index)}: {error} [{type(error).__name__}]"
            ) from error
        return image, int(self.targets[index]), index

    def _note_bad(self, index: int, error: ImageReadError) -> None:
        if not self._bad[index]:
            self._bad[index] = True
            logger.warning("skipped: %s", error)
        count, limit = int(self._bad.sum()), max(_MIN_BAD_ALLOWED, int(_MAX_BAD_SHARE * len(self)))
        if count > limit:
            raise ImageReadError(
                f"DATA.BAD_IMAGES skip gives up: {count} images could not be read, more than {limit} "
                f"({_MAX_BAD_SHARE:.0%} of the data set, at least {_MIN_BAD_ALLOWED}); is the storage healthy? {error}"
            )


def build_dataset(config: CfgNode, *, is_train: bool) -> ImageDataset:
    """Return the training or the validation data set of the configuration.

    Raises:
        ValueError: unknown DATA.DATASET, or no DATA.DATA_PATH for one that needs it.
        FileNotFoundError: files are missing; names them.
    """
    if config.DATA.DATASET not in DATASETS:
        raise ValueError(f"DATA.DATASET is {config.DATA.DATASET!r}; known: {', '.join(DATASETS)}")
    source = _build_source(config, is_train=is_train)
    if config.DATA.CACHE_DECODED == "ram" and not isinstance(source, ArraySource):
        source = DecodedSource(source)
    skip_bad = is_train and config.DATA.BAD_IMAGES == "skip"
    dataset = ImageDataset(source, build_transform(config, is_train=is_train), seed=config.SEED, skip_bad=skip_bad)
    if is_train or not config.DATA.VAL_CACHE:
        return dataset
    return ImageDataset(FinishedSource(dataset, folder=config.DATA.VAL_CACHE), np.asarray, seed=config.SEED)


def build_datasets(config: CfgNode) -> tuple[ImageDataset, ImageDataset]:
    """Return (training set, validation set)."""
    return build_dataset(config, is_train=True), build_dataset(config, is_train=False)


def _build_source(config: CfgNode, *, is_train: bool) -> Source:
    data = config.DATA
    as_array = data.PIPELINE == "fast"
    if data.DATASET == "digits":
        return digits_source(is_train=is_train, as_array=as_array)
    if not data.DATA_PATH:
        raise ValueError(f"DATA.DATASET {data.DATASET!r} needs DATA.DATA_PATH (--data-path): where are the images?")
    if data.DATASET in CIFAR_DATASETS:
        return cifar_source(data.DATASET, data.DATA_PATH, is_train=is_train, download=data.DOWNLOAD, as_array=as_array)
    prefix = "train" if is_train else "val"
    if data.ZIP_MODE:
        return ZipSource(data.DATA_PATH, prefix, cache_mode=data.CACHE_MODE, as_array=as_array)
    return FolderSource(Path(data.DATA_PATH) / prefix, as_array=as_array)
