"""Images in ``train.zip`` and ``val.zip``, listed in ``train_map.txt`` and ``val_map.txt``.

A line of a map is ``path<TAB>class``: the path of a member of the archive, and a class number or a class name. Numbered
classes are named after the folders of their images, so that a checkpoint fits both the archive and its unpacked folder.
Maps from Windows are read, too: a byte order mark, UTF-16, CRLF, backslashes.

The directory of the archive is read once; after that every process, data workers included, reads members with
``os.pread``, which uses no file position and so is safe between processes, and checks their CRC.
"""

import codecs
import hashlib
import logging
import os
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.images.decode import Picture, decode_image
from data.loading.shared_memory import SharedItems
from data.sources.base import PackedStrings
from data.sources.listing import image_error
from utils.errors import ImageReadError
from utils.runtime import get_rank, get_world_size

logger = logging.getLogger(__name__)

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,7}(\.0+)?")  # negative ones are reported by check_data


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
        channels: of the images (see ``decode_image``).

    Raises:
        FileNotFoundError: archive or map missing, or the map names members that the archive lacks.
        ValueError: a map that cannot be read, an encrypted member, or too little memory.
    """

    def __init__(self, root: str | Path, prefix: str, *, cache_mode: str, as_array: bool, channels: int = 3) -> None:
        self.archive = Path(root) / f"{prefix}.zip"
        map_file = Path(root) / f"{prefix}_map.txt"
        for file in (self.archive, map_file):
            if not file.is_file():
                raise FileNotFoundError(f"zip mode needs {file}: DATA.DATA_PATH must hold {prefix}.zip and its map")
        listed = read_map(map_file)
        entries = _find_members(self.archive, map_file, listed)
        paths = [entry.filename.replace("\\", "/") for entry in entries]
        train_map = Path(root) / "train_map.txt"
        known = []
        if map_file != train_map and train_map.is_file():  # val may lack a class, and val.zip has no folders at times
            train = read_map(train_map)
            known, _ = number_classes(train.labels, [_plain(path) for path in train.paths])
        self.classes, self.targets = number_classes(listed.labels, paths, known)
        self._paths = PackedStrings(paths)
        self._members = _locations(self.archive, entries)
        self.as_array, self.channels = as_array, channels
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
        return decode_image(self.read(index), as_array=self.as_array, channels=self.channels)

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
        except OSError as error:
            raise image_error(error) from error
        except struct.error as error:
            raise ImageReadError("the archive is truncated, or was changed during the run") from error
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


class MapLines(NamedTuple):
    """The images of a map file: member of the archive, class text and line number of each."""

    paths: list[str]
    labels: list[str]
    lines: list[int]


def read_map(file: str | Path) -> MapLines:
    """Return what a map file lists.

    Raises:
        ValueError: another encoding than UTF-8 or UTF-16, a malformed line, or no line; names the file and the line.
    """
    listed = MapLines([], [], [])
    for number, line in enumerate(_decode_map(Path(file)).split("\n"), start=1):
        if not line.strip():
            continue
        path, separator, label = line.rpartition("\t")
        if not separator or not path.strip() or not label.strip():
            raise ValueError(
                f"{file}, line {number}: expected 'path<TAB>class', found {line!r}. Where a comma or a space stands "
                f"before the class, this replaces it: sed -i -E 's/[, ]+([^, ]+)$/\\t\\1/' {file}"
            )
        listed.paths.append(path)
        listed.labels.append(label.strip())
        listed.lines.append(number)
    if not listed.paths:
        raise ValueError(f"{file} lists no images")
    return listed


def _decode_map(file: Path) -> str:
    """Return the text of a map file with plain line ends."""
    data = file.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        if encoding == "utf-8-sig" and b"\0" in data:
            raise UnicodeDecodeError(encoding, data, data.index(0), len(data), "zero bytes: UTF-16 without its mark?")
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        source = "utf-16le" if b"\0" in data else "latin1"
        raise ValueError(
            f"{file}, line {line}: not {encoding.removesuffix('-sig')} text ({error.reason}); save the file as UTF-8, "
            f"for example with: iconv -f {source} -t utf-8 {file} > NEW"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def number_classes(
    labels: Sequence[str], paths: Sequence[str] = (), known: Sequence[str] = ()
) -> tuple[list[str], np.ndarray]:
    """Return class names and integer targets for class texts.

    If all texts are whole numbers they are the targets, and the names are those of the images' folders where each class
    has a folder of its own, else the numbers; otherwise the classes are numbered in the sorted order of their names.

    Args:
        labels: class text of each image; ``3.0`` is a whole number, too.
        paths: path of each image, with slashes.
        known: class names of the training set, which are taken where they fit.
    """
    if all(_WHOLE_NUMBER.fullmatch(label) for label in labels):
        targets = np.array([int(label.partition(".")[0]) for label in labels], dtype=np.int64)
        names = [str(number) for number in range(int(targets.max()) + 1)]
        for number, folder in _class_folders(targets.tolist(), paths).items():
            names[number] = folder
        fits = len(names) <= len(known) and all(name in (known[n], str(n)) for n, name in enumerate(names))
        return list(known) if fits else names, targets
    names = sorted(set(labels))
    if set(names) <= set(known):
        names = list(known)
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[label] for label in labels], dtype=np.int64)


def _class_folders(targets: Sequence[int], paths: Sequence[str]) -> dict[int, str]:
    """Return the folder of each class: of the outermost level at which classes and folders belong together one to one.

    Empty where there is no such level.
    """
    folders = [path.split("/")[:-1] for path in paths]
    if min(targets) < 0:
        return {}
    for level in range(min(map(len, folders), default=0)):
        pairs = {(target, folder[level]) for target, folder in zip(targets, folders, strict=True)}
        found = dict(pairs)
        if len(found) == len(pairs) == len(set(found.values())):
            return found
    return {}


def _plain(path: str) -> str:
    """Return a path as most archives spell it: no backslashes, ``./`` or blanks around it, composed Unicode letters."""
    return unicodedata.normalize("NFC", path.strip().replace("\\", "/").removeprefix("./"))


def _find_members(archive: Path, map_file: Path, listed: MapLines) -> list[zipfile.ZipInfo]:
    """Return the directory entry of each listed image."""
    try:
        with zipfile.ZipFile(archive) as opened:
            directory = {entry.filename: entry for entry in opened.infolist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{archive} is not a readable zip archive: {error}") from error
    plain = {_plain(name): entry for name, entry in directory.items()}
    entries = [directory.get(path) or plain.get(_plain(path)) for path in listed.paths]
    missing = [number for number, entry in enumerate(entries) if entry is None]
    if missing:
        first = missing[0]
        header = "; is it a header? Then remove it" if missing == [0] and len(entries) > 1 else ""
        raise FileNotFoundError(
            f"{map_file} lists {len(missing)} files that {archive} does not hold, the first in line "
            f"{listed.lines[first]}: {listed.paths[first]!r}{header}; the archive's names are such as "
            f"{next((name for name in directory if not name.endswith('/')), 'none')!r}"
        )
    taken = {entry.filename for entry in entries}
    left = sum(not entry.is_dir() for entry in directory.values()) - len(taken)
    if left:
        logger.warning("%s: %d files were not taken, because %s does not list them", archive, left, map_file)
    if len(taken) < len(entries):
        logger.warning("%s lists %d files more than once", map_file, len(entries) - len(taken))
    return entries


def _locations(archive: Path, entries: Sequence[zipfile.ZipInfo]) -> dict[str, np.ndarray]:
    """Return where members lie in the archive, as flat arrays."""
    for entry in entries:
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{archive}: {entry.filename} is encrypted or not stored/deflated; pack with 'zip -0 -r'")
    return {
        "offset": np.array([entry.header_offset for entry in entries], dtype=np.int64),
        "stored": np.array([entry.compress_size for entry in entries], dtype=np.int64),
        "deflated": np.array([entry.compress_type == zipfile.ZIP_DEFLATED for entry in entries]),
        "crc": np.array([entry.CRC for entry in entries], dtype=np.uint32),
    }
