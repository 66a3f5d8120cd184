"""Caches that give the same pixels faster: decoded images in memory, finished validation images in a file."""

import hashlib
import json
import logging
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from data.images.decode import Picture
from data.images.transforms import EvalResize, torch_resize
from data.loading.loader import ImageLoader
from data.loading.shared_memory import SharedItems
from data.sources.base import EncodedSource
from utils.errors import ImageReadError
from utils.runtime import once_per_machine, usable_cores

logger = logging.getLogger(__name__)

_WRITE_BATCH = 64


class DecodedSource:
    """A source whose images are decoded once and kept in memory, as uint8 RGB in full size.

    Images that cannot be read are not kept: each use of them fails as it does without the cache.

    Raises:
        ValueError: the images do not fit into memory.
    """

    def __init__(self, source: EncodedSource) -> None:
        self._source = source
        self.classes = source.classes
        self.targets = source.targets
        self.as_array = source.as_array
        with ThreadPoolExecutor(usable_cores()) as threads:  # the decoders release the interpreter lock
            count = len(source.targets)
            sizes = threads.map(self._size, range(count))
            self._sizes = np.array(list(tqdm(sizes, "image sizes", count, disable=None, leave=False)), dtype=np.int32)
            self._pixels = SharedItems(self._sizes.prod(axis=1, dtype=np.int64) * 3, purpose="DATA.CACHE_DECODED ram")
            list(tqdm(threads.map(self._keep, range(count)), "decoding", count, disable=None, leave=False))

    def name(self, index: int) -> str:
        return self._source.name(index)

    def load(self, index: int) -> Picture:
        height, width = self._sizes[index]
        if not height:
            return self._source.load(index)
        pixels = self._pixels[index].reshape(height, width, 3)
        return pixels if self.as_array else Image.fromarray(pixels)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

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


class FinishedSource:
    """Validation images that have been through the transform, memory-mapped from a file.

    The file's name contains a hash of everything that the pixels depend on: the list of images with their sizes and
    times of change, the transform, and the version of the library that resizes. One process of each machine writes it,
    under another name until it is complete.

    Args:
        dataset: the ImageDataset that makes the images: its ``source`` and its ``transform``, an EvalResize.
        folder: where the file lies; made if need be.

    Raises:
        RuntimeError: the file could not be written, or an image not be read; on all processes alike.
    """

    def __init__(self, dataset: Dataset, *, folder: str | Path) -> None:
        self._source = dataset.source
        self.classes = self._source.classes
        self.targets = self._source.targets
        self.as_array = True
        size = dataset.transform.size
        self._shape = (len(self.targets), size, size, 3)
        self._file = Path(folder) / f"val_{_cache_key(dataset)}.npy"
        self._mapped: np.ndarray | None = None
        once_per_machine(lambda: self._write_if_missing(dataset), what=f"writing the validation cache {self._file}")

    def name(self, index: int) -> str:
        return self._source.name(index)

    def load(self, index: int) -> Picture:
        if self._mapped is None:
            self._mapped = np.asarray(np.load(self._file, mmap_mode="r"))
        return self._mapped[index]

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": None}  # each process maps the file itself

    def _write_if_missing(self, dataset: Dataset) -> None:
        if self._file.exists():
            if np.load(self._file, mmap_mode="r").shape == self._shape:  # ValueError if the file is truncated
                return
            raise ValueError("a file of another shape has this name; delete it")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
        loader = ImageLoader(dataset, batch_size=_WRITE_BATCH, num_workers=usable_cores(shared=False))
        try:
            pixels = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=self._shape)
            for images, _, indices in tqdm(loader, f"validation cache {self._file}", disable=None, leave=False):
                pixels[indices.numpy()] = images.permute(0, 2, 3, 1).numpy()  # (B, C, H, W) -> (B, H, W, C)
            pixels.flush()
            unfinished.replace(self._file)
        finally:
            loader.close()
            unfinished.unlink(missing_ok=True)
        logger.info("wrote the validation cache %s (%.2f GB)", self._file, self._file.stat().st_size / 1e9)


def _cache_key(dataset: Dataset) -> str:
    transform: EvalResize = dataset.transform
    library = f"Pillow {PIL.__version__}"
    if transform.resize is torch_resize:
        library = f"torch {torch.__version__} in the order of {library}"
    facts = {
        "format": 1,
        "images": dataset.source.fingerprint(),
        "size": transform.size,
        "short_side": transform.short_side,
        "interpolation": transform.interpolation,
        "library": library,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
