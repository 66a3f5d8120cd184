"""What a source of images is, and the plainest two: folders, and arrays in memory.

Sources hold their lists in flat arrays. A Python list of a million paths would be copied page by page into every data
worker, because reading a Python object writes its reference count.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data.images.decode import Picture, decode_image
from data.sources.listing import Listing, list_images, read_image_file, some

logger = logging.getLogger(__name__)


class Source(Protocol):
    """What a data set needs to know about its images."""

    classes: list[str]
    targets: np.ndarray  # int64 (N,), label of each image
    as_array: bool  # return arrays where that is faster, else always PIL images
    channels: int  # of the images: 3 for RGB, 1 for grey, any other for bands as they are stored

    def name(self, index: int) -> str:
        """Return where image ``index`` comes from, for messages."""

    def load(self, index: int) -> Picture:
        """Return image ``index``. Raises ImageReadError (without the name) if it cannot be read."""

    def fingerprint(self) -> str:
        """Return a hash that changes when the images may have changed."""


class EncodedSource(Source, Protocol):
    """A source of image files."""

    def read(self, index: int) -> bytes:
        """Return the content of image file ``index``. Raises ImageReadError if it cannot be read."""


class PackedStrings:
    """An immutable sequence of strings, kept in two arrays."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [os.fsencode(s) for s in strings]
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class FileSource:
    """Image files, each with a label.

    Args:
        root: folder that the paths are relative to.
        paths: path of each image.
        targets: label of each image.
        classes: class names, in the order of the labels.
        as_array: decode with the fast decoder where possible (see ``decode_image``).
        channels: of the images (see ``decode_image``).
    """

    def __init__(
        self,
        root: str | Path,
        paths: Sequence[str],
        targets: Sequence[int],
        classes: Sequence[str],
        *,
        as_array: bool,
        channels: int = 3,
    ) -> None:
        self._prefix = os.path.join(root, "")
        self._paths = PackedStrings(paths)
        self.targets = np.array(targets, dtype=np.int64)
        self.classes = list(classes)
        self.as_array, self.channels = as_array, channels

    def keep(self, indices: np.ndarray) -> None:
        """Leave out all images but those of ``indices``."""
        self._paths = PackedStrings([self._paths[index] for index in indices.tolist()])
        self.targets = self.targets[indices]

    def name(self, index: int) -> str:
        return os.path.join(self._prefix, self._paths[index])

    def read(self, index: int) -> bytes:
        return read_image_file(self.name(index))

    def load(self, index: int) -> Picture:
        return decode_image(self.read(index), as_array=self.as_array, channels=self.channels)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index in range(len(self._paths)):
            status = os.stat(self.name(index))
            digest.update(f"{self._paths[index]}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace"))
        return digest.hexdigest()


class FolderSource(FileSource):
    """Images in ``root/CLASS/...``, in the order of torchvision's ImageFolder (classes in sorted order).

    What lies there and is not an image is logged.

    Args:
        root: folder with one folder for each class.
        classes: number the classes as in this list, which may name more of them than ``root`` has. A list that lacks
            one of ``root``'s classes is not used.
        images: ``as_array`` and ``channels`` of ``FileSource``.

    Raises:
        FileNotFoundError: no such folder, no class folders, or no images.
        ValueError: a link leads into a folder twice, or something with the name of an image is not a readable file.
    """

    def __init__(self, root: str | Path, *, classes: Sequence[str] = (), **images: Any) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"no folder {self.root}: DATA.DATA_PATH must hold train/CLASS/IMAGE and val/CLASS/IMAGE"
            )
        listing = list_images(self.root)
        self._check(listing)
        classes = classes if set(listing.folders) <= set(classes) else listing.folders
        numbers = {name: number for number, name in enumerate(classes)}
        paths = [path for path in listing.images if os.sep in path]
        targets = [numbers[path.partition(os.sep)[0]] for path in paths]
        super().__init__(root, paths, targets, classes, **images)

    def _check(self, listing: Listing) -> None:
        for remark in listing.remarks():
            logger.warning("%s: %s", self.root, remark)
        if not listing.folders:
            raise FileNotFoundError(f"{self.root} has no class folders: expected {self.root}/CLASS/IMAGE")
        outside = sum(os.sep not in path for path in listing.images)
        if outside:
            logger.warning("%s: %d images outside the class folders were not taken", self.root, outside)
        if listing.unusable:
            shown = some(f"{path}: {reason}" for path, reason in sorted(listing.unusable.items()))
            raise ValueError(
                f"{self.root} holds {len(listing.unusable)} images that cannot be read ({shown}); remove or repair "
                "them (tools/check_data.py lists all)"
            )
        if len(listing.images) == outside:
            raise FileNotFoundError(f"{self.root} has {len(listing.folders)} class folders but no image in them")


class ArraySource:
    """Images that are already in memory.

    Args:
        images: uint8 (N, H, W, 3).
        targets: N labels.
        classes: class names.
        title: name of the data set, for messages (``title[17]``).
        as_array: return the images as arrays, else as PIL images.
        channels: 3, or 1 to convert the images to grey.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(
        self,
        images: np.ndarray,
        targets: Sequence[int],
        classes: Sequence[str],
        *,
        title: str,
        as_array: bool,
        channels: int = 3,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(
                f"MODEL.STRIP_MLP.IN_CHANS is {channels}, but the images of {title} are RGB; take 3, or 1 for grey"
            )
        self.images = images
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = list(classes)
        self._title = title
        self.as_array, self.channels = as_array, channels

    def keep(self, indices: np.ndarray) -> None:
        """Leave out all images but those of ``indices``."""
        self.images, self.targets = self.images[indices], self.targets[indices]

    def name(self, index: int) -> str:
        return f"{self._title}[{index}]"

    def load(self, index: int) -> Picture:
        pixels = self.images[index]
        if self.channels == 1:
            return Image.fromarray(pixels).convert("L")
        return pixels if self.as_array else Image.fromarray(pixels)

    def fingerprint(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.images).tobytes()).hexdigest()
