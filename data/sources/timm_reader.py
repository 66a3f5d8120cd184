"""Data sets that timm opens: torchvision's, folders, tar files and Hugging Face data sets, by timm's names.

Only those that can be read at random are taken, because the order of an epoch, and with it exact resume, needs images
by their number. Files are read as they are and decoded as those of every other source.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset
from torch.utils.data import IterableDataset
from yacs.config import CfgNode

from data.images.decode import Picture, decode_image
from data.sources.base import ArraySource, FileSource, Source
from data.sources.listing import image_error
from utils.config import read_arguments
from utils.errors import ImageReadError
from utils.runtime import once_per_machine

PREFIX = "timm:"
_OPTIONS = ("train_split", "val_split", "class_map", "input_key", "target_key")
_STREAMS = ("hfids", "tfds", "wds")


def timm_source(config: CfgNode, part: str, **images: Any) -> Source:
    """Return the data set of DATA.DATASET ``timm:NAME``.

    Args:
        config: the configuration.
        part: ``train`` or ``val``.
        images: ``as_array`` and ``channels`` of ``FileSource``.

    Raises:
        ValueError: it cannot be opened, or not be read at random; says what to do.
    """
    data = config.DATA
    name = data.DATASET.removeprefix(PREFIX)
    options = _read_options(data.TIMM_OPTIONS)
    splits = {"train": options.pop("train_split", "train"), "val": options.pop("val_split", "validation")}
    split, kind = splits.get(part, part), name.partition("/")[0].lower()
    _check_name(name, kind)
    root = _root(data.DATA_PATH, kind, (split, part))
    arguments = {"root": root, "split": split, "download": data.DOWNLOAD, **options}
    if kind == "tar":
        arguments["cache_tarfiles"] = False  # processes would share the position in an open file
    if kind in ("torch", "hfds"):  # which may download
        once_per_machine(lambda: _create(name, arguments), what=f"opening {data.DATASET}")
    return _as_source(_create(name, arguments), f"{data.DATASET}[{split}]", root, images)


class ReaderSource:
    """The images of a reader of timm, such as those of Hugging Face data sets and tar files.

    Args:
        reader: timm's reader: ``reader[index]`` gives an open file and a label.
        targets: label of each image.
        classes: class names, in the order of the labels.
        title: name of the data set, for messages.
        digest: hash of the data.
        as_array: decode with the fast decoder where possible.
        channels: of the images.
    """

    def __init__(
        self,
        reader: Any,
        targets: Sequence[int],
        classes: Sequence[str],
        *,
        title: str,
        digest: str,
        as_array: bool,
        channels: int = 3,
    ) -> None:
        self._reader, self._title, self._digest = reader, title, digest
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = list(classes)
        self.as_array, self.channels = as_array, channels

    def name(self, index: int) -> str:
        return f"{self._title}[{index}]"

    def read(self, index: int) -> bytes:
        try:
            file, *_ = self._reader[index]
            with file:
                return file.read()
        except OSError as error:
            raise image_error(error) from error
        except Exception as error:  # each reader's library has errors of its own
            raise ImageReadError(f"{error} [{type(error).__name__}]") from error

    def load(self, index: int) -> Picture:
        return decode_image(self.read(index), as_array=self.as_array, channels=self.channels)

    def fingerprint(self) -> str:
        return self._digest


def _read_options(text: str) -> dict[str, Any]:
    try:
        options = read_arguments(text)
    except ValueError as error:
        raise ValueError(
            f"DATA.TIMM_OPTIONS: {str(error).partition(' is not')[0]} is not a list such as "
            "input_key='img', val_split='test'"
        ) from error
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise ValueError(f"DATA.TIMM_OPTIONS: {unknown[0]} is unknown; known: {', '.join(_OPTIONS)}")
    return options


def _check_name(name: str, kind: str) -> None:
    if kind in _STREAMS:
        remedy = "hfds/ in its place" if kind == "hfids" else "tools/pack.py and DATA.DATASET shards"
        raise ValueError(
            f"DATA.DATASET timm:{name}: {kind}/ is a stream, which cannot be read at random, as exact resume needs; "
            f"take {remedy}"
        )
    if not (name in ("folder", "tar") or (kind in ("torch", "hfds") and "/" in name)):
        raise ValueError(
            f"DATA.DATASET timm:{name} is unknown; known: timm:folder, timm:tar, timm:torch/NAME, timm:hfds/NAME"
        )


def _root(path: str, kind: str, names: Sequence[str]) -> str | None:
    """Return the folder, or the tar file, that timm is to open; None for Hugging Face's own place."""
    if kind == "hfds":
        return path or None
    if not path:
        raise ValueError("DATA.DATASET timm:... needs DATA.DATA_PATH (--data-path): where are the images?")
    files = [Path(path) / f"{name}.tar" for name in names]
    if kind != "tar":
        return path
    if Path(path).is_file():
        return path
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"DATA.DATASET timm:tar looks for {files[0]}, which is not there")
    return str(found)


def _create(name: str, arguments: dict[str, Any]) -> Any:
    try:
        return create_dataset("" if name in ("folder", "tar") else name, **arguments)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"DATA.DATASET timm:{name} needs the package {error.name}: pip install {error.name}"
        ) from error
    except Exception as error:  # asserts, and whatever the libraries behind timm raise
        text = " ".join(str(error).split()) or "it refuses the name or the arguments"
        raise ValueError(
            f"DATA.DATASET timm:{name} cannot be opened ({', '.join(f'{k}={v!r}' for k, v in arguments.items())}): "
            f"{text} [{type(error).__name__}]"
        ) from error


def _as_source(dataset: Any, title: str, root: str | None, images: dict[str, Any]) -> Source:
    """Return what timm opened as a source."""
    reader = getattr(dataset, "reader", None)
    files = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None) or getattr(reader, "samples", None)
    if isinstance(files, list) and files and isinstance(files[0][0], str):  # folders
        paths, targets = zip(*files, strict=True)
        classes = _names(getattr(reader, "class_to_idx", {})) or getattr(dataset, "wnids", None) or dataset.classes
        relative = [os.path.relpath(path, root) for path in paths]
        return FileSource(str(root), relative, targets, classes, **images)
    if hasattr(dataset, "data") and np.ndim(dataset.targets) == 1:  # torchvision's in memory
        pixels = np.asarray(dataset.data)
        rgb = pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, axis=-1)
        return ArraySource(rgb, np.asarray(dataset.targets), list(map(str, dataset.classes)), title=title, **images)
    if hasattr(reader, "dataset"):  # Hugging Face
        table = reader.dataset
        targets = np.asarray(table.with_format("numpy")[reader.label_key][:])
        if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
            raise ValueError(
                f"{title}: the column {reader.label_key!r} holds no class numbers; name another with "
                "DATA.TIMM_OPTIONS \"target_key='...'\""
            )
        classes = _names(reader.class_to_idx) or list(map(str, range(int(targets.max()) + 1)))
        return ReaderSource(reader, targets, classes, title=title, digest=table._fingerprint, **images)
    if hasattr(reader, "targets"):  # tar files
        status = os.stat(str(root))
        digest = hashlib.sha256(f"{root}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()
        classes = _names(reader.class_name_to_idx)
        return ReaderSource(reader, reader.targets, classes, title=title, digest=digest, **images)
    kind = "a stream" if isinstance(dataset, IterableDataset) else "of a kind that is not known here"
    raise ValueError(f"{title} is {kind}: its images cannot be read at random with their labels")


def _names(numbers: dict[str, int] | None) -> list[str]:
    """Return the names of the classes in the order of their numbers."""
    return [str(name) for name, _ in sorted((numbers or {}).items(), key=lambda item: item[1])]
