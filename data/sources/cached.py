"""Caches that give the same pixels faster: decoded images in memory, finished validation images in a file."""

import hashlib
import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.images.decode import Picture
from data.images.resize import EvalResize
from data.loading.shared_memory import SharedItems
from data.sources.base import EncodedSource, Source
from utils.errors import ImageReadError
from utils.runtime import atomic_file, usable_cores

logger = logging.getLogger(__name__)


class _CachedSource:
    """The images of another source, with their names and labels."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.classes = source.classes
        self.targets = source.targets
        self.as_array = source.as_array

    def name(self, index: int) -> str:
        return self._source.name(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


class DecodedSource(_CachedSource):
    """A source whose images are decoded once and kept in memory, as uint8 RGB in full size.

    Images that cannot be read are not kept: each use of them fails as it does without the cache.

    Raises:
        ValueError: the images do not fit into memory.
    """

    def __init__(self, source: EncodedSource) -> None:
        super().__init__(source)
        with ThreadPoolExecutor(usable_cores()) as threads:  # the decoders release the interpreter lock
            count = len(source.targets)
            sizes = threads.map(self._size, range(count))
            self._sizes = np.array(list(tqdm(sizes, "image sizes", count, disable=None, leave=False)), dtype=np.int32)
            self._pixels = SharedItems(self._sizes.prod(axis=1, dtype=np.int64) * 3, purpose="DATA.CACHE_DECODED ram")
            list(tqdm(threads.map(self._keep, range(count)), "decoding", count, disable=None, leave=False))

    def load(self, index: int) -> Picture:
        height, width = self._sizes[index]
        if not height:
            return self._source.load(index)
        pixels = self._pixels[index].reshape(height, width, 3)
        return pixels if self.as_array else Image.fromarray(pixels)

    def _size(self, index: int) -> tuple[int, int]:
        """Return (height, width) from the header, (0, 0) if that fails."""
        try:
            with Image.open(BytesIO(self._source.read(index))) as image:
                return image.height, image.width
        except Exception:  # whatever Pillow finds wrong is reported, with its name, when the image is used
            return 0, 0

    def _keep(self, index: int) -> None:
        try:
            pixels = np.asarray(self._source.load(index)) if self._sizes[index, 0] else None
        except ImageReadError:
            pixels = None
        if pixels is None:
            self._sizes[index] = 0
        else:
            self._pixels[index][:] = pixels.reshape(-1)


class FinishedSource(_CachedSource):
    """Validation images that have been through the transform, memory-mapped from a file.

    Args:
        source: where the images came from.
        file: the file of ``finished_file``, complete.
    """

    def __init__(self, source: Source, file: Path) -> None:
        super().__init__(source)
        self._file = file
        self._mapped: np.ndarray | None = None

    def load(self, index: int) -> Picture:
        if self._mapped is None:
            self._mapped = np.asarray(np.load(self._file, mmap_mode="r"))
        return self._mapped[index]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": None}  # each process maps the file itself


def finished_file(folder: Path, source: Source, transform: EvalResize) -> Path:
    """Return where the finished images of ``source`` lie.

    The file's name contains a hash of everything that the pixels depend on: the list of images with their sizes and
    modification times, the transform, and the version of the library that resizes.
    """
    metadata = {"format": 1, "images": source.fingerprint(), **transform.metadata()}
    key = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:24]
    return folder / f"val_{key}.npy"


def is_finished(file: Path, shape: tuple[int, ...]) -> bool:
    """Return whether ``file`` exists, for images of ``shape`` (N, S, S, 3).

    Raises:
        ValueError: the file is truncated or holds another shape.
    """
    if not file.exists():
        return False
    if np.load(file, mmap_mode="r").shape != shape:  # ValueError if the file is truncated
        raise ValueError("a file of another shape has this name; delete it")
    return True


def write_finished(file: Path, batches: Iterable[tuple[Tensor, Tensor, Tensor]], shape: tuple[int, ...]) -> None:
    """Write the images of ``batches``, which ``collate`` made, to ``file``; it appears when it is complete.

    Args:
        file: where; its folder is made if need be.
        batches: (images, targets, indices) of all images.
        shape: of all images, (N, S, S, 3).

    Raises:
        OSError: the file could not be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        pixels = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for images, _, indices in tqdm(batches, f"validation cache {file}", disable=None, leave=False):
            pixels[indices.numpy()] = images.permute(0, 2, 3, 1).numpy()  # (B, C, H, W) -> (B, H, W, C)
        pixels.flush()
    logger.info("wrote the validation cache %s (%.2f GB)", file, file.stat().st_size / 1e9)
