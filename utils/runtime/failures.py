"""Errors that end a run: whose mistake they are, and what the console, the log and the other processes get of them."""

import logging
import re
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import timm
import torch.distributed as dist

from utils.errors import CheckpointError, ImageReadError, NonFiniteError, RunError, message_text, one_line
from utils.runtime.distributed import get_rank, get_world_size
from utils.runtime.signals import Interrupted

logger = logging.getLogger(__name__)

# Errors whose message says all: what is wrong, where, and what to do.
USER_ERRORS = (ValueError, OSError, CheckpointError, ImageReadError, NonFiniteError, RunError)
SIGNAL_SECONDS = 1.0  # a signal to all processes reaches one of them this much later than another
STORE_SECONDS = 5.0  # an answer of the shared store takes less, if it comes
_FAILED, _STOPPED = "failed", "stopped"  # keys in the store that the processes share
_LOST = re.compile("connection (closed|reset|refused)|broken pipe|timed out|timeout|remote process exited", re.I)


def error_text(error: BaseException) -> str:
    """Return the message of an error with the notes that were added to it."""
    text = message_text(error)
    if isinstance(error, AssertionError) and not text:
        text = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return "; ".join([text, *getattr(error, "__notes__", ())])


def is_user_error(error: BaseException) -> bool:
    """Return whether an error is a user's mistake, or the machine's, and its message says all.

    timm checks its arguments, which come from the configuration, with assertions.
    """
    if isinstance(error, AssertionError):
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        return Path(timm.__file__).parent in Path(innermost.filename).parents
    return isinstance(error, USER_ERRORS) or is_lost_connection(error)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error tells that another process has ended or hangs."""
    from_torch = isinstance(error, RuntimeError) and not isinstance(error, USER_ERRORS)
    return get_world_size() > 1 and from_torch and bool(_LOST.search(str(error)))


def settle(error: BaseException, store: dist.Store | None) -> BaseException:
    """Return what ends this process: ``error``, or the signal that ended another process.

    The signal arrives here next, or the other process has told of it (``tell_of_signal``).
    """
    if is_lost_connection(error):
        try:
            time.sleep(SIGNAL_SECONDS)
        except KeyboardInterrupt as interrupt:
            return interrupt
        number = _told(store, _STOPPED)
        if number:
            return Interrupted(int(number))
    return error


def tell_of_signal(number: int, store: dist.Store | None) -> None:
    """Tell the other processes that a signal ends this one, so that they end in the same way."""
    _tell_others(store, _STOPPED, str(number))


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Note in an error from inside what the process was doing; of nested phases the innermost counts.

    Args:
        name: a participle, such as ``saving``; the log says "stops while saving".
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, "phase"):
            error.phase = name
        raise


def log_failure(error: BaseException, store: dist.Store | None) -> None:
    """Log what ends the run, its traceback in the file alone, and tell the other processes.

    Args:
        error: what ends this process.
        store: what the processes share, or None if they have not met.
    """
    who = f"rank {get_rank()} on {socket.gethostname()}"
    doing = f" while {error.phase}" if hasattr(error, "phase") else ""
    lost = is_lost_connection(error)
    culprit = _culprit(store) if lost else getattr(error, "culprit", "")
    if culprit:
        place = "; ".join(getattr(error, "__notes__", ()))
        reason = f" because {culprit}" if lost else f" because {culprit} failed: {one_line(error)}"
        text = f"{doing}{f' ({place})' if place else ''}{reason}"
    elif lost:
        text = f"{doing}: another process failed or hangs: {error_text(error)}"
    else:
        text = f"{doing}: {error_text(error)}"
    logger.error("%s stops%s", who, text, exc_info=error, extra={"brief": True})
    if not (culprit or lost):
        _tell_others(store, _FAILED, f"{who} failed{doing}: {one_line(error)}")


def _tell_others(store: dist.Store | None, key: str, text: str) -> None:
    if store is None or get_world_size() == 1:
        return
    try:
        store.set_timeout(timedelta(seconds=SIGNAL_SECONDS))
        store.set(key, text)
    except RuntimeError as error:
        logger.debug("the other processes were not told: %s", error)


def _culprit(store: dist.Store | None) -> str:
    """Return which process said that it failed, where and why, or '' if none did."""
    told = _told(store, _FAILED)
    if told is None:
        return "" if dist.is_torchelastic_launched() else "rank 0 has ended (its own log says why)"
    return told


def _told(store: dist.Store | None, key: str) -> str | None:
    """Return what another process wrote under a key of the shared store, '' if nothing.

    None: whoever held the store has ended, which is torchrun, or rank 0 without it.
    """
    answers: list[str] = []

    def ask() -> None:
        with suppress(RuntimeError):
            answers.append(store.get(key).decode() if store is not None and store.check([key]) else "")

    thread = threading.Thread(target=ask, daemon=True)  # through a cut cable, an answer never comes
    thread.start()
    thread.join(STORE_SECONDS)
    return answers[0] if answers else None
