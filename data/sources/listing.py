"""Which files below a folder are images: one walk for training, evaluation and the tools.

Folders, their order and the order of files are those of torchvision's ImageFolder. Unlike there, more endings count,
what desktops and tools leave behind does not, each folder is entered once, and what cannot be a readable file is named.
"""

import errno
import logging
import os
import stat
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from utils.config import expand_path
from utils.errors import ImageReadError, RunError

logger = logging.getLogger(__name__)

# torchvision's nine, and what else Pillow reads as one picture without another program
IMAGE_ENDINGS = frozenset(
    (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    + (".apng", ".avif", ".dib", ".gif", ".j2k", ".jfif", ".jif", ".jp2", ".jpe", ".jpx", ".mpo")
    + (".pbm", ".pnm", ".qoi", ".tga")
)
_NO_ENDING = "without ending"
# first bytes of JPEG, PNG, GIF, TIFF, BMP, WebP, PBM to PPM, JPEG 2000; for files without ending
_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"BM",
    b"RIFF",
    b"P4",
    b"P5",
    b"P6",
    b"\0\0\0\x0cjP",
)
_LEFTOVERS = frozenset(("@eadir", "__macosx", "thumbs.db", "desktop.ini", "#recycle", "$recycle.bin", "lost+found"))
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_SHOWN = 5  # names in a message


@dataclass
class Listing:
    """What lies below a folder; paths are relative to it.

    Attributes:
        folders: names of the folders directly in it, sorted: the classes, where each class has a folder.
        images: paths of the images, by folder in ``folders``, then by folder below it, then by name.
        unusable: path -> reason, for what has the name of an image but is not a file that can be read.
        other_files: number of files that are not images, by ending.
        leftovers: number of hidden and system files and folders, by name; what is in them was not looked at.
    """

    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)
    other_files: Counter[str] = field(default_factory=Counter)
    leftovers: Counter[str] = field(default_factory=Counter)

    def remarks(self) -> list[str]:
        """Return what the user should know about the files that are not images."""
        remarks = []
        if self.other_files:
            count = self.other_files.total()
            remarks.append(
                f"{count} {'file was' if count == 1 else 'files were'} not taken: {_counts(self.other_files)}"
            )
        if self.leftovers:
            remarks.append(f"hidden and system files and folders are not part of the data: {_counts(self.leftovers)}")
        return remarks


def list_images(root: str | Path) -> Listing:
    """Walk through the folders below ``root`` and return what is there; links to folders are followed.

    A file is an image if its name has one of ``IMAGE_ENDINGS``, or no ending and the first bytes of an image.

    Raises:
        ValueError: links lead into a folder twice, or into themselves; names both ways.
        OSError: a folder cannot be read.
    """
    listing = Listing()
    found: list[tuple[str, str, list[str]]] = []  # folder below root, folder, names of images
    entered: dict[tuple[int, int], str] = {}
    pending = [""]
    while pending:
        folder = pending.pop()
        path = os.path.join(root, folder) if folder else str(root)
        _enter(path, entered)
        names = []
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_leftover(entry.name):
                    listing.leftovers["._*" if entry.name.startswith("._") else entry.name] += 1
                elif _is_folder(entry):
                    pending.append(os.path.join(folder, entry.name))
                elif _is_image(entry, os.path.join(folder, entry.name), listing):
                    names.append(entry.name)
        found.append((folder.partition(os.sep)[0], folder, sorted(names)))
    found.sort()
    listing.folders = sorted({top for top, _, _ in found if top})
    listing.images = [os.path.join(folder, name) for _, folder, names in found for name in names]
    return listing


def class_folders(root: str | Path) -> list[str]:
    """Return the sorted names of the class folders in ``root``; none if there is no ``root``."""
    if not os.path.isdir(root):
        return []
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if not _is_leftover(entry.name) and _is_folder(entry))


def read_image_file(path: str) -> bytes:
    """Return the content of a regular file; never waits for the other end of a FIFO or for a device.

    Raises:
        ImageReadError: the file cannot be read, or is not a regular file.
        RunError: this process has too many open files.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ImageReadError(f"not a regular file but {_KINDS.get(stat.S_IFMT(mode), 'something else')}")
            return file.read()
    except OSError as error:
        raise image_error(error) from error


def expanded_path(text: str) -> Path:
    """Return a path of a command line with ``~`` and ``$VARIABLE`` replaced, which the shell leaves in ``--flag=~/x``.

    Raises:
        ArgumentTypeError: a variable that is not set, or a user who is not known.
    """
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def image_error(error: OSError) -> ImageReadError | RunError:
    """Return what a failure to read an image file means: for that image, or for the whole run."""
    text = f"{error.strerror or error} [{type(error).__name__}]"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return RunError(f"{text}: raise the limit of open files with `ulimit -n 4096`, or lower DATA.NUM_WORKERS")
    return ImageReadError(text)


def some(names: Iterable[str]) -> str:
    """Return the first names, quoted, and how many there are, for messages."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ... ({len(names)} in all)"


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _enter(path: str, entered: dict[tuple[int, int], str]) -> None:
    """Note that the walk is in ``path``; refuse a folder that it has been in."""
    status = os.stat(path)
    identity = (status.st_dev, status.st_ino)
    earlier = entered.setdefault(identity, path)
    # the names decide, because some network file systems give one number to several folders
    if earlier is not path and os.path.realpath(earlier) == os.path.realpath(path):
        raise ValueError(
            f"{path} and {earlier} are the same folder, so its images would count more than once, or without end; "
            "remove the symbolic link"
        )


def _is_leftover(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LEFTOVERS


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into itself, or through a folder that must not be read
        return False


def _is_image(entry: os.DirEntry, path: str, listing: Listing) -> bool:
    """Return whether a directory entry is an image; note in ``listing`` what else it is."""
    ending = os.path.splitext(entry.name)[1].lower()
    if ending and ending not in IMAGE_ENDINGS:
        listing.other_files[ending] += 1
        return False
    reason = _unusable_reason(entry)
    if reason:
        listing.unusable[path] = reason
        return False
    try:
        if ending or _starts_like_image(entry.path):
            return True
        listing.other_files[_NO_ENDING] += 1
    except OSError as error:
        listing.unusable[path] = error.strerror
    return False


def _unusable_reason(entry: os.DirEntry) -> str:
    """Return why a directory entry is not a file that can be read, or an empty text."""
    try:
        if entry.is_file():  # for all but links known without a system call
            return ""
        return _KINDS.get(stat.S_IFMT(os.stat(entry.path).st_mode), "not a regular file")
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as error:
        return error.strerror


def _starts_like_image(path: str) -> bool:
    with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
        start = file.read(12)
    return start.startswith(_STARTS) or start[4:] == b"ftypavif"


def _counts(counter: Counter[str]) -> str:
    shown = [f"{name} {count}" for name, count in counter.most_common(_SHOWN)]
    rest = counter.total() - sum(count for _, count in counter.most_common(_SHOWN))
    return ", ".join([*shown, *([f"others {rest}"] if rest else [])])
