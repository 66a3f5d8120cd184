"""Files that are replaced as a whole: readers see the old file or the new one, never a part.

Not every file system can do all that this takes. What one refuses to do is left out with one warning that says which
promise is lost; an error of the device (EIO, ENOSPC) stays an error.
"""

import errno
import functools
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

# How file systems say that they cannot do something: CIFS, FUSE, exFAT, Lustre, EFS and others differ.
UNSUPPORTED = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.ENOTTY}
_NO_LINKS = UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV}


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Replace ``path`` by the file that the block writes, atomically and durably.

    The block writes to the temporary name that it is given, and may check what it wrote. Then the file is flushed to
    disk and renamed over ``path``, and the folder is flushed too. After an error ``path`` is what it was. The temporary
    file is gone either way; only a killed process leaves it behind.

    Args:
        path: final name; its folder exists.

    Yields:
        A name that begins with a dot, in the same folder.
    """
    temporary = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        _flush(temporary, "a file")
        os.replace(temporary, path)
        _flush(path.parent, "a folder", {errno.EACCES, errno.EPERM, errno.EISDIR})  # some systems do not open folders
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by a file with ``text``, as ``atomic_file`` does.

    Raises:
        OSError: the text could not be written; names ``path``.
    """
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def link_or_copy(source: Path, target: Path) -> None:
    """Give ``source`` the second name ``target``, which must not exist; copy it where links are not possible."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def try_folder(folder: Path) -> None:
    """Do once in ``folder`` what a save does, so that a folder that cannot take one is found now.

    Raises:
        OSError: writing, flushing, renaming over an existing file, or linking and copying failed.
    """
    probe, second = folder / ".probe", folder / ".probe-link"
    try:
        for text in ("first", "second"):
            write_text_atomic(probe, text)
        second.unlink(missing_ok=True)
        link_or_copy(probe, second)
        if (probe.read_text(encoding="utf-8"), second.read_text(encoding="utf-8")) != ("second", "second"):
            raise OSError(errno.EIO, "what was written does not read back", str(probe))
    finally:
        for path in (probe, second):
            path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int | None:
    """Return the bytes that this user can still write to ``folder``, or None where the file system does not tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total > 0 else None  # FUSE without statfs reports zeros


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning; later calls with the same text do nothing."""
    logger.warning(text)


def _flush(path: Path, kind: str, tolerated: frozenset[int] | set[int] = frozenset()) -> None:
    """Flush a file or a folder to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED | tolerated:
            raise
        warn_once(
            f"the file system of {path.parent if kind == 'a file' else path} cannot flush {kind} to disk "
            f"({error.strerror}): a power cut may lose the newest checkpoint, though not damage an older one"
        )


def set_aside(path: Path, reason: object) -> None:
    """Rename a file or folder that cannot be used to ``NAME.aside``, or to the first free number after it, and warn."""
    target, number = path.with_name(f"{path.name}.aside"), 2
    while os.path.lexists(target):
        target, number = path.with_name(f"{path.name}.aside{number}"), number + 1
    os.rename(path, target)
    logger.warning("%s cannot be used and is now %s: %s", path, target.name, reason)


@contextmanager
def side_file(path: Path) -> Iterator[None]:
    """Let a block write ``path``, which nothing depends on: a folder there is set aside, an error only warns."""
    try:
        if path.is_dir():
            set_aside(path, "it is a folder")
        yield
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s could not be written: %s; the run goes on without it", path.name, error)
