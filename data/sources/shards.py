"""Images in shards: tar files of WebDataset's layout with an index, read at random, from a folder or a web server.

A set of shards is a folder with

* ``shard-000000.tar``, ...: for each image ``KEY.cls``, the class number as text, and ``KEY.jpg`` (or ``.png``, ...),
  the file. The keys are the numbers of the images;
* ``samples.npz``: of each image its label, shard, offset, size and CRC-32, and the path that it was packed from;
* ``index.json``: class names, names and sizes of the shards, and the SHA-256 sum of ``samples.npz``. It is written
  last: a set without it is not complete.

The order of the images is that of the folder they come from, so that both train alike. ``tools/pack.py`` writes them.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.images.decode import Picture, decode_image
from data.sources.base import PackedStrings
from data.sources.listing import some
from data.sources.ranges import is_address, place_at
from utils.errors import ImageReadError
from utils.runtime import atomic_file, write_text_atomic

INDEX, SAMPLES = "index.json", "samples.npz"
FORMAT = 1
_COLUMNS = {"label": np.int64, "shard": np.int32, "offset": np.int64, "size": np.int64, "crc32": np.uint32}


class Shard(NamedTuple):
    """A tar file: its name, its size in bytes, and how many images it holds."""

    name: str
    size: int
    images: int


class ShardSource:
    """The images of a set of shards.

    Args:
        where: folder of the set, or its address.
        as_array: decode with the fast decoder where possible (see ``decode_image``).
        channels: of the images (see ``decode_image``).

    Raises:
        FileNotFoundError: no index, or shards are missing; names them.
        ValueError: the index cannot be used, or shards have another size than it says; names them.
        RunError: the server cannot be reached, or does not answer Range requests.
    """

    def __init__(self, where: str | Path, *, as_array: bool, channels: int = 3) -> None:
        self._place = place_at(where)
        index = self._place.content(INDEX)
        self.classes, self._shards, samples = _read_index(index, self._place.where(INDEX))
        self._columns, names = _read_samples(self._place.content(SAMPLES), samples, self._place.where(SAMPLES))
        self._names = PackedStrings(names)
        self._check_columns()
        self._check_sizes()
        self.targets = self._columns.pop("label")
        self._digest = hashlib.sha256(index).hexdigest()
        self.as_array, self.channels = as_array, channels

    def name(self, index: int) -> str:
        return f"{self._place.where(self._shard(index).name)}@/{self._names[index]}"

    def read(self, index: int) -> bytes:
        """Return the content of image file ``index``.

        Raises:
            ImageReadError: its checksum is another one: the shard was damaged or changed.
            RunError: the shard is missing, shorter than it was, or cannot be read, which concerns more than one image.
        """
        shard, offset, size = self._shard(index), int(self._columns["offset"][index]), int(self._columns["size"][index])
        data = self._place.read(shard.name, offset, size) if size else b""
        if zlib.crc32(data) != self._columns["crc32"][index]:
            raise ImageReadError(
                f"the shard is damaged, or was changed: the checksum (CRC-32) of bytes {offset}-{offset + size - 1} is "
                "not the one of its index; copy the shard anew"
            )
        return data

    def load(self, index: int) -> Picture:
        return decode_image(self.read(index), as_array=self.as_array, channels=self.channels)

    def fingerprint(self) -> str:
        """Return a hash of all labels, names and checksums, the same wherever the shards lie."""
        return self._digest

    def _shard(self, index: int) -> Shard:
        return self._shards[self._columns["shard"][index]]

    def _check_columns(self) -> None:
        columns, sizes = self._columns, np.array([shard.size for shard in self._shards], dtype=np.int64)
        inside = (columns["shard"] >= 0) & (columns["shard"] < len(sizes))
        inside &= (columns["offset"] >= 0) & (columns["size"] >= 0)
        if not inside.all() or (columns["offset"] + columns["size"] > sizes[columns["shard"]]).any():
            raise ValueError(f"{self._place.where(SAMPLES)} and {INDEX} do not fit each other; pack the images anew")

    def _check_sizes(self) -> None:
        """Compare the size of each shard with the index."""
        missing, other = [], []
        for shard in self._shards:
            try:
                size = self._place.size(shard.name)
            except FileNotFoundError:
                missing.append(shard.name)
                continue
            if size != shard.size:
                other.append(f"{shard.name}: {size} bytes instead of {shard.size}")
        where = self._place.where("").rstrip("/")
        if missing:
            raise FileNotFoundError(
                f"{where} lacks {len(missing)} of its {len(self._shards)} shards: {some(missing)}; copy them there"
            )
        if other:
            raise ValueError(
                f"{where} has {len(other)} shards of another size than {INDEX} says ({some(other)}): copy them anew"
            )


def is_shard_set(folder: str | Path) -> bool:
    """Return whether there is a set of shards in a folder or at an address.

    Raises:
        RunError: the address cannot be read.
    """
    try:
        place = place_at(folder)
        return all(place.size(name) >= 0 for name in (INDEX, SAMPLES))
    except (FileNotFoundError, NotADirectoryError):
        return False


def part_of(where: str, part: str) -> str:
    """Return the folder or the address of a part, such as ``train``, of the data at a folder or an address."""
    if not is_address(where):
        return str(Path(where) / part)
    address, mark, query = where.partition("?")
    return f"{address.rstrip('/')}/{part}{mark}{query}"


def write_index(
    folder: Path,
    *,
    classes: Sequence[str],
    shards: Sequence[Shard],
    columns: dict[str, np.ndarray],
    names: Sequence[str],
    packed: dict[str, Any],
) -> None:
    """Write ``samples.npz`` and then ``index.json``, which completes the set.

    Args:
        folder: the set's.
        classes: names of the classes.
        shards: the tar files.
        columns: ``label``, ``shard``, ``offset``, ``size`` and ``crc32`` of each image.
        names: path that each image was packed from.
        packed: how the images were packed, for the reader of the index.
    """
    encoded = np.frombuffer(b"\0".join(name.encode(errors="surrogateescape") for name in names), dtype=np.uint8)
    arrays = {name: np.asarray(columns[name], dtype=kind) for name, kind in _COLUMNS.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, names=encoded, **arrays)
    with atomic_file(folder / SAMPLES) as temporary:
        temporary.write_bytes(buffer.getvalue())
    index = {
        "format": FORMAT,
        "images": len(names),
        "classes": list(classes),
        "samples": {"name": SAMPLES, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()},
        "shards": [shard._asdict() for shard in shards],
        "packed": packed,
    }
    write_text_atomic(folder / INDEX, json.dumps(index, indent=1) + "\n")


def _read_index(data: bytes, where: str) -> tuple[list[str], list[Shard], str]:
    """Return (class names, shards, SHA-256 sum of the samples)."""
    try:
        index = json.loads(data)
        version = index["format"]
        if version != FORMAT:
            raise ValueError(f"its format is {version!r}, known is {FORMAT}")
        shards = [Shard(str(entry["name"]), int(entry["size"]), int(entry["images"])) for entry in index["shards"]]
        if any("/" in shard.name or shard.name in ("", ".", "..") for shard in shards):
            raise ValueError("a shard lies in another folder")
        classes = [str(name) for name in index["classes"]]
        if not shards or not classes:
            raise ValueError("it lists no shards or no classes")
        return classes, shards, str(index["samples"]["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{where} is not the index of a set of shards ({error!r}); tools/pack.py writes it") from error


def _read_samples(data: bytes, digest: str, where: str) -> tuple[dict[str, np.ndarray], list[bytes]]:
    """Return (columns, names) of all images."""
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{where} is damaged, or belongs to another {INDEX}: its SHA-256 sum differs; copy both anew")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            columns = {name: arrays[name].astype(kind, casting="safe") for name, kind in _COLUMNS.items()}
            names = arrays["names"].tobytes().split(b"\0")
        if {column.shape for column in columns.values()} != {(len(names),)}:
            raise ValueError("its columns have different lengths")
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{where} cannot be used ({error!r}); pack the images anew") from error
    return columns, names
