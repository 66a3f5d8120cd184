"""Where a checkpoint file keeps its pickle and the bytes of its tensors: PyTorch's zip format, and the one before 1.6.

A zip archive says everything twice. It is read only if both accounts agree, every member is stored plainly in a stretch
of its own, and its checksum is right: no archive can make a tensor out of memory that was never written.
"""

import io
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.checkpoint.pickled import MAX_BYTES, PickleFault, Reader, TensorSpec
from utils.errors import CheckpointError

logger = logging.getLogger(__name__)

_MAX_DIRECTORY = 2**25  # bytes of a zip's directory; 300,000 members
_SPARE = 2**28  # bytes of tensors beyond the size of their file
_LOCAL = struct.Struct("<4s5H3I2H")
_FAULTS = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    LookupError,
    OverflowError,
)
_FORMAT_1 = (0x1950A86A20F9469CFC6C, 1001)  # magic number and protocol of the format before 1.6


@dataclass(frozen=True)
class Place:
    """A stretch of the file; ``crc`` is None where the file has no checksums."""

    name: str
    offset: int
    nbytes: int
    crc: int | None


@dataclass
class Archive:
    """An opened checkpoint.

    Attributes:
        path, file: the file.
        tree: its contents, with ``TensorSpec`` in the place of tensors.
        places: where the storages are, by key.
        unknown: names of classes that the file asks for.
    """

    path: Path
    file: BinaryIO
    tree: Any
    places: dict[str, Place]
    unknown: set[str]
    _tensors: dict[TensorSpec, Tensor] = field(default_factory=dict)
    _shared: dict[str, Tensor] = field(default_factory=dict)
    _crcs: dict[TensorSpec, int] = field(default_factory=dict)
    _bytes: int = 0

    def tensor(self, spec: TensorSpec, entry: str) -> Tensor:
        """Return a contiguous tensor that owns its memory, every byte of it read from the file and checked.

        The same description gives the same tensor.

        Args:
            spec: what the pickle says.
            entry: its name, for messages.

        Raises:
            CheckpointError: the bytes are missing or damaged, or the tensor is larger than the file could hold.
        """
        if spec not in self._tensors:
            self._tensors[spec] = self._read(spec, entry)
        return self._tensors[spec]

    def crc(self, spec: TensorSpec) -> int:
        """Return the CRC-32 of a tensor's bytes: of the one that ``tensor`` returned, else read for this alone."""
        if spec not in self._crcs:
            tensor = self._tensors[spec] if spec in self._tensors else self._read(spec, "a tensor")
            if spec not in self._crcs:
                self._crcs[spec] = tensor_crc(tensor)
        return self._crcs[spec]

    def check_places(self) -> None:
        """Compare every storage with its checksum.

        Raises:
            CheckpointError: one is damaged.
        """
        for place in self.places.values():
            read_place(self.file, place, self.path)

    def _read(self, spec: TensorSpec, entry: str) -> Tensor:
        self._bytes += spec.numel * spec.dtype.itemsize
        if self._bytes > os.fstat(self.file.fileno()).st_size + _SPARE:
            raise CheckpointError(f"{self.path}: {entry}: {list(spec.size)} is more than the file holds")
        key, place = spec.storage.key, self.places.get(spec.storage.key)
        if place is None or place.nbytes != spec.storage.nbytes:
            found = "missing" if place is None else f"of {place.nbytes} bytes instead of {spec.storage.nbytes}"
            raise CheckpointError(f"{self.path} is damaged: {entry}: storage {key[:40]!r} is {found}")
        if not spec.numel:
            return torch.empty(spec.size, dtype=spec.dtype)
        if spec.contiguous:
            data, self._crcs[spec] = read_place(self.file, place, self.path)
            return data.view(spec.dtype).view(spec.size)
        if key not in self._shared:
            self._shared[key] = read_place(self.file, place, self.path)[0]
        usable = self._shared[key][: place.nbytes // spec.dtype.itemsize * spec.dtype.itemsize]
        view = usable.view(spec.dtype).as_strided(spec.size, spec.stride, spec.offset)
        return torch.empty(spec.size, dtype=spec.dtype).copy_(view)


def tensor_crc(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes in row-major order."""
    data = tensor.detach().to("cpu").contiguous().reshape(-1)
    return zlib.crc32(memoryview(data.view(torch.uint8).numpy())) if data.numel() else 0


def read_place(file: BinaryIO, place: Place, path: Path) -> tuple[Tensor, int]:
    """Return the bytes of a stretch of the file, as a tensor, and their CRC-32.

    Raises:
        CheckpointError: the file ends within it, or the checksum is wrong.
    """
    data = torch.empty(place.nbytes, dtype=torch.uint8)
    view = memoryview(data.numpy())
    file.seek(place.offset)
    done = 0
    while done < place.nbytes:
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{path} is truncated or damaged: it ends within {place.name!r}")
        done += count
    crc = zlib.crc32(view)
    if place.crc is not None and crc != place.crc:
        raise CheckpointError(f"{path} is damaged: the checksum of its member {place.name!r} is wrong")
    return data, crc


def open_archive(path: Path, file: BinaryIO, known: Mapping[str, Any], *, zipped: bool, strict: bool) -> Archive:
    """Open a file in one of PyTorch's two formats.

    Args:
        path: for messages.
        file: the file, open for reading.
        known: what the names of classes in the file mean, beyond tensors (``Reader``).
        zipped: the format since 1.6, else the one before.
        strict: refuse an archive without checksums instead of warning.

    Raises:
        CheckpointError: damaged, or its two accounts of itself differ.
    """
    reader = Reader(known)
    try:
        return (_open_zip if zipped else _open_legacy)(path, file, reader, strict)
    except PickleFault as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {error}") from None


def _open_zip(path: Path, file: BinaryIO, reader: Reader, strict: bool) -> Archive:
    try:
        members = _members(path, file)
    except CheckpointError:
        raise
    except _FAULTS as error:
        raise CheckpointError(f"{path} is truncated or damaged: {str(error)[:200] or type(error).__name__}") from error
    if all(place.crc == 0 for place in members.values() if place.nbytes):
        # torch.serialization.set_crc32_options(False): legitimate in a stranger's file, never in ours
        if strict:
            raise CheckpointError(f"{path} is damaged: the checksum of its member 'every member' is wrong")
        logger.warning("%s was written without checksums: damage would go unnoticed", path)
        members = {name: Place(p.name, p.offset, p.nbytes, None) for name, p in members.items()}
    roots = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{path} is damaged or not a checkpoint: the archive has no data.pkl")
    pickle, order = members[f"{roots[0]}data.pkl"], members.get(f"{roots[0]}byteorder")
    if pickle.nbytes > MAX_BYTES:
        raise CheckpointError(f"{path} is not read: its pickle has {pickle.nbytes:,} bytes, {MAX_BYTES:,} are read")
    if order is not None and (order.nbytes != 6 or bytes(read_place(file, order, path)[0].numpy()) != b"little"):
        raise CheckpointError(f"{path} is not read: its numbers are not in little-endian order")
    tree = reader.read(io.BytesIO(read_place(file, pickle, path)[0].numpy().tobytes()))
    prefix = f"{roots[0]}data/"
    places = {name.removeprefix(prefix): place for name, place in members.items() if name.startswith(prefix)}
    return Archive(path, file, tree, places, reader.unknown)


def _members(path: Path, file: BinaryIO) -> dict[str, Place]:
    """Return the members of a zip archive, after comparing its directory with the headers before each member."""
    if _directory_size(file) > _MAX_DIRECTORY:
        raise CheckpointError(
            f"{path} is not read: the directory of the archive is larger than {_MAX_DIRECTORY:,} bytes"
        )
    members, end = {}, 0
    with zipfile.ZipFile(file) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            if info.compress_type != zipfile.ZIP_STORED:
                # PyTorch never compresses; a small file could expand to more than the memory holds
                raise CheckpointError(f"{path} was not opened: its members are compressed, PyTorch writes them plain")
            file.seek(info.header_offset)
            magic, _, flags, method, *_, crc, packed, size, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
            written = file.read(name).decode("utf-8" if flags & 0x800 else "cp437")
            offset = info.header_offset + _LOCAL.size + name + extra
            told = ((crc, info.CRC), (packed, info.compress_size), (size, info.file_size))
            fault = (
                (magic != b"PK\3\4" or written != info.orig_filename, "the directory names another member")
                , (info.is_dir() or info.external_attr & 0x10, "it is marked as a folder")
                , (method != 0 or (flags | info.flag_bits) & 1, "it is compressed or encrypted")
                , (info.file_size != info.compress_size, "it has two sizes")
                , (any(here not in (0, 0xFFFFFFFF, there) for here, there in told), "its header differs")
                , (info.header_offset < end or offset + info.file_size > archive.start_dir, "it overlaps another")
                , (info.filename in members, "it is there twice")
            )  # fmt: skip
            for wrong, reason in fault:
                if wrong:
                    raise CheckpointError(f"{path} is damaged: member {info.filename[:60]!r}: {reason}")
            end = offset + info.file_size
            members[info.filename] = Place(info.filename, offset, info.file_size, info.CRC)
    return members


def _directory_size(file: BinaryIO) -> int:
    """Return the size of a zip's directory as its end record says, before anything is made of it."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - 22 - 20 - 0xFFFF)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise CheckpointError(f"{file.name} is truncated or damaged: the archive's directory is missing")
    (told,) = struct.unpack_from("<I", tail, at + 12)
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\6\7":
        (where,) = struct.unpack_from("<Q", tail, at - 12)
        if where + 48 <= size:
            file.seek(where + 40)
            told = max(told if told != 0xFFFFFFFF else 0, *struct.unpack("<Q", file.read(8)))
    return told


def _open_legacy(path: Path, file: BinaryIO, reader: Reader, _strict: bool) -> Archive:
    """Read magic number, protocol, system, contents and keys, five pickles in a row; then come the storages."""
    stream = io.BytesIO(file.read(MAX_BYTES))
    head = reader.read(stream)
    if head != _FORMAT_1[0]:
        raise PickleFault("it is a bare pickle")
    if reader.read(stream) != _FORMAT_1[1]:
        raise PickleFault("it has another protocol")
    reader.read(stream)
    tree = reader.read(stream)
    keys = reader.read(stream)
    if not isinstance(keys, list) or any(type(key) is not str for key in keys):
        raise PickleFault("its list of storages is damaged")
    places, offset, size = {}, stream.tell(), os.fstat(file.fileno()).st_size
    for key in keys:
        storage = reader.storages.get(key)
        file.seek(offset)
        head = file.read(8)
        count = int.from_bytes(head, "little")
        if storage is None or len(head) < 8 or count != storage.numel or offset + 8 + storage.nbytes > size:
            raise PickleFault(f"storage {key[:40]!r} is missing or cut off")
        places[key] = Place(key, offset + 8, storage.nbytes, None)
        offset += 8 + storage.nbytes
    return Archive(path, file, tree, places, reader.unknown)
