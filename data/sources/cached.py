"""Caches that give the same pixels faster: decoded images in memory, finished validation images in a file."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.images.decode import Picture
from data.images.resize import EvalResize, as_image
from data.loading.shared_memory import SharedItems
from data.sources.base import EncodedSource, Source
from utils.errors import ImageReadError
from utils.runtime import atomic_file, usable_cores

logger = logging.getLogger(__name__)

_ABANDONED_SECONDS = 24 * 3600  # a file that nobody has written to for so long has no writer any more


class _CachedSource:
    """The images of another source, with their names and labels."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.classes = source.classes
        self.targets = source.targets
        self.as_array, self.channels = source.as_array, source.channels

    def name(self, index: int) -> str:
        return self._source.name(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


class DecodedSource(_CachedSource):
    """A source whose images are decoded once and kept in memory, as uint8 in full size.

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
            self._pixels = SharedItems(
                self._sizes.prod(axis=1, dtype=np.int64) * self.channels, purpose="DATA.CACHE_DECODED ram"
            )
            list(tqdm(threads.map(self._keep, range(count)), "decoding", count, disable=None, leave=False))

    def load(self, index: int) -> Picture:
        height, width = self._sizes[index]
        if not height:
            return self._source.load(index)
        pixels = self._pixels[index].reshape(height, width, self.channels)
        return pixels if self.as_array or self.channels not in (1, 3) else as_image(pixels)

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
    if source.channels != 3:
        metadata["channels"] = source.channels
    key = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:24]
    return folder / f"val_{key}.npy"


def is_finished(file: Path, shape: tuple[int, ...]) -> bool:
    """Return whether ``file`` exists, for images of ``shape`` (N, H, W, C).

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
        shape: of all images, (N, H, W, C).

    Raises:
        OSError: the file could not be written; a disk that is too small is found out before the first image.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(file.parent)
    # written, not mapped: where the disk is full, a write is an error and an access to mapped memory a crash
    with atomic_file(file) as temporary, open(temporary, "wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        start, size = stream.tell(), math.prod(shape[1:])
        _reserve(stream, start + shape[0] * size)
        for images, _, indices in tqdm(batches, f"validation cache {file}", disable=None, leave=False):
            pictures = images.permute(0, 2, 3, 1).numpy()  # (B, C, H, W) -> (B, H, W, C)
            for index, picture in zip(indices.tolist(), pictures, strict=True):
                stream.seek(start + index * size)
                stream.write(np.ascontiguousarray(picture))
        stream.flush()
    logger.info("wrote the validation cache %s (%.2f GB)", file, file.stat().st_size / 1e9)


def _reserve(stream: BinaryIO, size: int) -> None:
    """Make room for ``size`` bytes on the disk, or raise OSError; a file system that cannot reserve is not asked to."""
    try:
        os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(os.path.dirname(stream.name)).free
            raise OSError(
                errno.ENOSPC,
                f"{error.strerror}: {size / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free; give DATA.VAL_CACHE "
                "another folder, or make room",
            ) from error
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of writers on this machine that were killed, and any that rested for a day."""
    mine = f".tmp-{socket.gethostname()}-"
    for leftover in folder.glob(".val_*.npy.tmp-*"):
        _, is_mine, pid = leftover.name.rpartition(mine)
        with contextlib.suppress(FileNotFoundError):  # another process removed it, or has finished it
            rested = time.time() - leftover.stat().st_mtime
            if rested > _ABANDONED_SECONDS or (is_mine and pid.isdecimal() and not _is_alive(int(pid))):
                leftover.unlink()
                logger.info("removed %s, which a killed process left", leftover)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True
