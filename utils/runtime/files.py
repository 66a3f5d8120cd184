"""Files that are replaced whole: readers see the old or the new one, never a part."""

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        _fsync(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(PermissionError):  # some systems do not open folders
            _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by a file with ``text``; readers see the old or the new one, never a part.

    Raises:
        OSError: the text could not be written; names ``path``.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def fsync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` durable (POSIX; a no-op where folders cannot be opened)."""
    with contextlib.suppress(PermissionError, NotADirectoryError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
