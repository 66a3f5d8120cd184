"""Files that are replaced as a whole: readers see the old file or the new one, never a part."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


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
    """Replace ``path`` by a file with ``text``, as ``atomic_file`` does.

    Raises:
        OSError: the text could not be written; names ``path``.
    """
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
