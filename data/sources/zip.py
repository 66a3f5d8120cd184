"""Images in ``train.zip`` and ``val.zip``, listed in ``train_map.txt`` and ``val_map.txt``.

A line of a map is ``path<TAB>class``: the path of a member of the archive, and a class number or a class name. The
directory of the archive is read once; after that every process, data workers included, reads members with
``os.pread``, which uses no file position and so is safe between processes, and checks their CRC.
"""

import hashlib
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.images.decode import Picture, decode_image
from data.loading.shared_memory import SharedItems
from data.sources.base import PackedStrings
from utils.errors import ImageReadError
from utils.runtime import get_rank, get_world_size

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,7}")  # negative ones are reported by check_data


class ZipSource:
    """Images in ``root/PREFIX.zip`` (``prefix``: train or val).

    Args:
        root: folder that holds the archive and its map.
        prefix: ``train`` or ``val``.
        cache_mode: which compressed files stay in memory: ``no`` none, ``full`` all of them in every process, ``part``
            the files whose index modulo the number of processes is this process's rank; the others are read from the
            archive each time. Unlike in Swin-Transformer's code, ``part`` does not change which process trains on
            which image.
        as_array: decode with the fast decoder where possible.

    Raises:
        FileNotFoundError: archive or map missing, or the map names members that the archive lacks.
        ValueError: a malformed map line, an encrypted member, or too little memory.
    """

    def __init__(self, root: str | Path, prefix: str, *, cache_mode: str, as_array: bool) -> None:
        self.archive = Path(root) / f"{prefix}.zip"
        map_file = Path(root) / f"{prefix}_map.txt"
        for file in (self.archive, map_file):
            if not file.is_file():
                raise FileNotFoundError(f"zip mode needs {file}: DATA.DATA_PATH must hold {prefix}.zip and its map")
        paths, labels = read_map(map_file)
        self.classes, self.targets = number_classes(labels)
        self._paths = PackedStrings(paths)
        self._members = _locate_members(self.archive, paths, map_file)
        self.as_array = as_array
        self._file: tuple[int, int] | None = None  # (process id, file descriptor)
        self._cached: SharedItems | None = None
        if cache_mode != "no":
            self._fill_cache(whole=cache_mode == "full")

    def name(self, index: int) -> str:
        return f"{self.archive}@/{self._paths[index]}"

    def read(self, index: int) -> bytes:
        kept = b"" if self._cached is None else self._cached[index].tobytes()
        return self._unpack(index, kept or self._read_stored(index))

    def load(self, index: int) -> Picture:
        return decode_image(self.read(index), as_array=self.as_array)

    def fingerprint(self) -> str:
        status = self.archive.stat()
        digest = hashlib.sha256(f"{status.st_size}\0{status.st_mtime_ns}\n".encode())
        for index in range(len(self._paths)):
            digest.update(f"{self._paths[index]}\n".encode(errors="replace"))
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}  # a file descriptor means nothing in another process

    def _descriptor(self) -> int:
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), os.open(self.archive, os.O_RDONLY))
        return self._file[1]

    def _read_stored(self, index: int) -> bytes:
        """Return the bytes of a member as they are stored, perhaps compressed."""
        offset, size = int(self._members["offset"][index]), int(self._members["stored"][index])
        try:
            file = self._descriptor()
            header = os.pread(file, _LOCAL_HEADER.size, offset)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            start = offset + _LOCAL_HEADER.size + name_length + extra_length
            stored = os.pread(file, size, start)
        except (OSError, struct.error) as error:
            raise ImageReadError(f"the archive cannot be read: {error} [{type(error).__name__}]") from error
        if signature != b"PK\x03\x04" or len(stored) != size:
            raise ImageReadError("the archive is truncated, or was changed during the run")
        return stored

    def _unpack(self, index: int, stored: bytes) -> bytes:
        try:
            data = zlib.decompress(stored, -zlib.MAX_WBITS) if self._members["deflated"][index] else stored
        except zlib.error as error:
            raise ImageReadError(f"the compressed data is damaged: {error}") from error
        if zlib.crc32(data) != self._members["crc"][index]:
            raise ImageReadError("the checksum (CRC-32) of the archive member does not match its data")
        return data

    def _fill_cache(self, *, whole: bool) -> None:
        mine = np.ones(len(self._paths), dtype=bool)
        if not whole:
            mine = np.arange(len(mine)) % get_world_size() == get_rank()
        cached = SharedItems(np.where(mine, self._members["stored"], 0), purpose="DATA.CACHE_MODE (--cache-mode)")
        indices = np.flatnonzero(mine).tolist()
        for index in tqdm(indices, desc=f"reading {self.archive.name}", disable=None, leave=False):
            cached[index][:] = np.frombuffer(self._read_stored(index), dtype=np.uint8)
        self._cached = cached


def read_map(file: str | Path) -> tuple[list[str], list[str]]:
    """Return the paths and the class texts of a map file.

    Raises:
        ValueError: a malformed line, or no line.
    """
    paths, labels = [], []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        path, separator, label = line.rpartition("\t")
        if not separator or not path or not label.strip():
            raise ValueError(f"{file}, line {number}: expected 'path<TAB>class', found {line!r}")
        paths.append(path)
        labels.append(label.strip())
    if not paths:
        raise ValueError(f"{file} lists no images")
    return paths, labels


def number_classes(labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return class names and integer targets for class texts.

    If all texts are whole numbers they are the targets, and the names are the numbers; otherwise the classes are
    numbered in the sorted order of their names.
    """
    if all(_WHOLE_NUMBER.fullmatch(label) for label in labels):
        targets = np.array([int(label) for label in labels], dtype=np.int64)
        return [str(number) for number in range(int(targets.max()) + 1)], targets
    names = sorted(set(labels))
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[label] for label in labels], dtype=np.int64)


def _locate_members(archive: Path, paths: Sequence[str], map_file: Path) -> dict[str, np.ndarray]:
    """Return where each listed member lies in the archive, as flat arrays."""
    try:
        with zipfile.ZipFile(archive) as opened:
            directory = {entry.filename: entry for entry in opened.infolist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{archive} is not a readable zip archive: {error}") from error
    missing = [path for path in paths if path not in directory]
    if missing:
        raise FileNotFoundError(
            f"{map_file} lists {len(missing)} files that {archive} does not hold, the first is {missing[0]!r}"
        )
    entries = [directory[path] for path in paths]
    for entry in entries:
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{archive}: {entry.filename} is encrypted or not stored/deflated; pack with 'zip -0 -r'")
    return {
        "offset": np.array([entry.header_offset for entry in entries], dtype=np.int64),
        "stored": np.array([entry.compress_size for entry in entries], dtype=np.int64),
        "deflated": np.array([entry.compress_type == zipfile.ZIP_DEFLATED for entry in entries]),
        "crc": np.array([entry.CRC for entry in entries], dtype=np.uint32),
    }
