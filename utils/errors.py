"""Exception classes that more than one wing raises or handles; each message says what is wrong and what to do."""

import re


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or used; the message names the file and the reason."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a non-finite loss or gradient."""


class ImageReadError(RuntimeError):
    """An image that cannot be used; the message names the file, its index and its class where they are known."""


def message_text(error: BaseException) -> str:
    """Return an error's own message, without the traceback that PyTorch puts before that of a data worker."""
    text = str(error).strip()
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:
        name = re.escape(type(error).__name__)
        starts = list(re.finditer(rf"^(?:[\w.]*\.)?{name}: ", text, flags=re.MULTILINE))
        text = text[starts[-1].end() :] if starts else text.splitlines()[-1]
    return text


def one_line(error: BaseException) -> str:
    """Return the first line of an error's own message, or the name of its class if it has none."""
    return next(iter(message_text(error).splitlines()), type(error).__name__)
