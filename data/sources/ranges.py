"""Byte ranges of files in a folder or on a web server, safe in threads, forked and spawned processes.

A folder is read with ``os.pread``, which uses no shared file position. A web server is asked for ranges over HTTP/1.1;
each thread of each process keeps a connection of its own. What fails there for a while is tried again.
"""

import http.client
import os
import re
import ssl
import threading
import time
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from utils.errors import RunError

_KEPT_FILES = 256  # open files of one process; others are opened for each read
_TIMEOUT = 30.0  # seconds without a byte from the server
_WAITS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between two attempts; a server closes idle connections
_TRY_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MOST_REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Place(Protocol):
    """Where files lie that are read in pieces; ``name`` is a file's name there."""

    def where(self, name: str) -> str:
        """Return path or address of a file, for messages."""

    def content(self, name: str) -> bytes:
        """Return a whole file. Raises FileNotFoundError if there is none, RunError if it cannot be read."""

    def size(self, name: str) -> int:
        """Return the size of a file in bytes. Raises as ``content``."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a file, from ``offset``. Raises RunError if they cannot be read."""


def is_address(text: str) -> bool:
    """Return whether a text is the address of a web server, not a path."""
    return text.lower().startswith(("http://", "https://"))


def place_at(where: str | Path) -> Place:
    """Return the folder, or the folder on a web server, at a path or an address."""
    return WebFolder(str(where)) if is_address(str(where)) else LocalFolder(Path(where))


class LocalFolder:
    """Files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: tuple[int, dict[str, int]] = (os.getpid(), {})  # process id, open files

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": (0, {})}  # a file descriptor means nothing in another process

    def where(self, name: str) -> str:
        return str(self._folder / name)

    def content(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unreadable(self.where(name), error.strerror) from error

    def size(self, name: str) -> int:
        try:
            return os.stat(self._folder / name).st_size
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unreadable(self.where(name), error.strerror) from error

    def read(self, name: str, offset: int, size: int) -> bytes:
        try:
            file, is_kept = self._open(name)
            try:
                data = os.pread(file, size, offset)
            finally:
                if not is_kept:
                    os.close(file)
        except OSError as error:
            raise _unreadable(self.where(name), f"{error.strerror} [{type(error).__name__}]") from error
        if len(data) != size:
            raise _unreadable(
                self.where(name), f"it is shorter than it was and has no bytes {offset}-{offset + size - 1}"
            )
        return data

    def _open(self, name: str) -> tuple[int, bool]:
        """Return a descriptor, and whether it stays open."""
        if self._files[0] != os.getpid():
            self._files = (os.getpid(), {})
        kept = self._files[1]
        if name in kept:
            return kept[name], True
        file = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        if len(kept) >= _KEPT_FILES:
            return file, False
        if kept.setdefault(name, file) != file:  # another thread was faster
            return file, False
        return file, True


class WebFolder:
    """Files below an address.

    Redirections are followed for each request. A query in the address (such as an access token) is sent with each
    request and left out of messages. Proxies of the environment are not used.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._base = parts._replace(path=parts.path.rstrip("/") + "/", fragment="")
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"_base": self._base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def where(self, name: str) -> str:
        return self._url(name)._replace(query="").geturl()

    def content(self, name: str) -> bytes:
        return self._ask(name, {})[1]

    def size(self, name: str) -> int:
        return self._range(name, 0, 1)[0]

    def read(self, name: str, offset: int, size: int) -> bytes:
        try:
            return self._range(name, offset, size)[1]
        except FileNotFoundError as error:
            raise RunError(str(error)) from error

    def _range(self, name: str, offset: int, size: int) -> tuple[int, bytes]:
        """Return (size of the file, bytes of a range)."""
        last = offset + size - 1
        headers, data = self._ask(name, {"Range": f"bytes={offset}-{last}"})
        found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if found is None or (int(found[1]), int(found[2]), len(data)) != (offset, last, size):
            raise _unreadable(
                self.where(name),
                f"asked for bytes {offset}-{last}, the server sent {len(data)} bytes "
                f"({headers.get('Content-Range') or 'no Content-Range'})",
            )
        return int(found[3]), data

    def _ask(self, name: str, wanted: dict[str, str]) -> tuple[http.client.HTTPMessage, bytes]:
        """Return headers and content of an answer; what may pass is tried again after a while."""
        attempts = 0
        for wait in (*_WAITS, None):
            attempts += 1
            try:
                status, headers, data = self._follow(name, wanted)
                reason = f"the server answers {status} {http.client.responses.get(status, '')}".rstrip()
            except (OSError, http.client.HTTPException) as error:
                self._forget()
                status, reason = 0, f"{error or 'no answer'} [{type(error).__name__}]"
                if isinstance(error, ssl.SSLCertVerificationError):
                    break
            if status == (206 if wanted else 200):
                return headers, data
            if status == 404:
                raise FileNotFoundError(f"{self.where(name)} is not there (the server answers 404)")
            if wanted and status == 200:
                reason = (
                    "the server ignores Range requests, without which single images cannot be read; serve the folder "
                    "with nginx, Apache, an object store or another server that answers them with 206, or copy it"
                )
            if status and status not in _TRY_AGAIN:
                break
            if wait is not None:
                time.sleep(wait)
        raise _unreadable(self.where(name), reason + (f", after {attempts} attempts" if attempts > 1 else ""))

    def _follow(self, name: str, wanted: dict[str, str]) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return (status, headers, content) of the answer at the end of the redirections."""
        url = self._url(name)
        for _ in range(_MOST_REDIRECTS + 1):
            connection = self._connection(url)
            target = url._replace(scheme="", netloc="").geturl()
            connection.request("GET", target, headers={"Accept-Encoding": "identity", **wanted})
            response = connection.getresponse()
            if response.status == 200 and wanted:  # the whole file is on its way
                self._forget()
                return response.status, response.headers, b""
            data = response.read()
            if response.status not in _REDIRECTS or not response.headers.get("Location"):
                return response.status, response.headers, data
            url = urlsplit(urljoin(url.geturl(), response.headers["Location"]))
        raise http.client.HTTPException(f"more than {_MOST_REDIRECTS} redirections")

    def _connection(self, url: SplitResult) -> http.client.HTTPConnection:
        """Return this thread's connection to the server of ``url``; never one that a forked process shares."""
        if getattr(self._local, "process", None) != os.getpid():
            self._local.process, self._local.connections = os.getpid(), {}
        kept = self._local.connections
        server = (url.scheme, url.netloc)
        if server not in kept:
            kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
            if url.scheme not in kinds or not url.hostname:
                raise http.client.HTTPException(f"{url.scheme or 'no'} address, not http or https")
            kept[server] = kinds[url.scheme](url.hostname, url.port, timeout=_TIMEOUT)
        return kept[server]

    def _forget(self) -> None:
        """Close this thread's connections, the next request makes new ones."""
        for connection in getattr(self._local, "connections", {}).values():
            connection.close()
        self._local.connections = {}

    def _url(self, name: str) -> SplitResult:
        return self._base._replace(path=self._base.path + quote(name))


def _unreadable(where: str, reason: str | None) -> RunError:
    return RunError(f"{where} cannot be read: {reason}")
