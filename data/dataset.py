"""One sample: load it, augment it under its own seed, name it in every error."""

import logging
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from data.images.transforms import Transform
from data.loading.collate import Sample
from data.loading.shared_memory import shared_zeros
from data.sources.base import Source
from utils.errors import ImageReadError, RunError
from utils.runtime import integer_seed, printable, seed_streams, streams_restored

logger = logging.getLogger(__name__)

_REPLACEMENT_TRIES = 20
_MIN_BAD_ALLOWED = 10
_MAX_BAD_SHARE = 0.01

SampleKey = int | tuple[int, int]  # index (evaluation), or (epoch, index) (training)


class ImageDataset(Dataset):
    """Transformed images of a source, with label and index.

    A key ``(epoch, index)`` seeds Python's, numpy's and torch's streams from ``(seed, epoch, index)`` before loading
    and transforming, and puts them back afterwards; a plain index, for evaluation, leaves them alone. Under repeated
    augmentation, an index of N and more is that of a further sample of image ``index % N``, with a seed of its own.

    Args:
        source: where the images come from.
        transform: picture -> uint8 array (H, W, C), or float tensor (C, H, W) in the reference pipeline.
        seed: seed of the run.
        skip_bad: in training, replace each image that cannot be read by another sample of the same epoch, chosen by
            the key alone. Such images are logged, and listed by ``bad_indices``.

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
        self._bad = shared_zeros(len(source.targets), torch.bool) if skip_bad else None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Return (image, target, index). ``index`` is that of the replacement where a bad image was skipped.

        Raises:
            ImageReadError: the image cannot be read; names path, index and class.
            RuntimeError: the transform failed on it; names them too.
            RunError: the fault is not the image's: too many files are open.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Sample]:
        """Return the samples of several keys; DataLoader calls this for a batch."""
        if not isinstance(keys[0], tuple):
            return [self._get(int(key)) for key in keys]
        with streams_restored():  # once per batch, because it takes longer than seeding
            return [self._get_seeded(*key) for key in keys]

    def sample_name(self, index: int) -> str:
        """Return the path of the image of sample ``index``, or a name such as ``digits[17]``."""
        return self.source.name(index % len(self))

    def describe(self, index: int) -> str:
        """Return path, index and class of a sample's image, for messages."""
        index %= len(self)
        target = int(self.targets[index])
        name = repr(self.classes[target]) if 0 <= target < len(self.classes) else f"label {target}"
        return f"{printable(self.sample_name(index))} (index {index}, class {name})"

    def bad_indices(self) -> list[int]:
        """Return the indices of the unreadable images met so far by this process and its workers."""
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
                self._note_bad(index % len(self), error)
            index = integer_seed(self._seed, epoch, wanted, attempt) % len(self)
        raise ImageReadError(f"{_REPLACEMENT_TRIES} images in a row could not be read, last {self.describe(index)}")

    def _get(self, index: int) -> Sample:
        try:
            image = self.transform(self.source.load(index % len(self)))
        except ImageReadError as error:
            raise ImageReadError(
                f"cannot read image {self.describe(index)}: {error}. tools/check_data.py lists all such files"
            ) from error
        except RunError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"the transform failed on {self.describe(index)}: {error} [{type(error).__name__}]"
            ) from error
        return image, int(self.targets[index % len(self)]), index

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
