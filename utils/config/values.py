"""From text to values: the type of a key's default says how its text is read.

YAML and the command line go through the same rules. YAML's own guesses are not used, because they surprise: ``off``
would be False, ``1e-4`` text, ``2024-01-01`` a date.
"""

import ast
import os
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from utils.config.suggest import did_you_mean

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)
NULL = ("", "null", "~", "none")


def convert(value: Any, default: Any, choices: Sequence[str] = (), *, any_length: bool = False) -> Any:
    """Return ``value`` as the type of ``default``.

    Args:
        value: text, a list of texts, or a value of the right type.
        default: a value of the type that is wanted.
        choices: known values of a text; upper and lower case do not matter, the spelling here is returned. After the
            colon of ``timm:NAME`` anything may follow.
        any_length: a list may have another length than the default, but not be empty.

    Raises:
        ValueError: with the reason alone, for example "'ten' is not a whole number".
    """
    if isinstance(default, bool):
        return _to_bool(value)
    if isinstance(default, (int, float)):
        return _to_number(value, type(default))
    if isinstance(default, str):
        return _to_choice(_to_text(value), choices)
    return _to_numbers(value, default, any_length=any_length)


def is_list(value: Any) -> bool:
    """Return whether ``value`` is a list of numbers, or text that writes one."""
    return isinstance(value, (list, tuple)) or (isinstance(value, str) and "," in value)


def is_null(value: Any) -> bool:
    """Return whether ``value`` is None or a text that stands for it."""
    return value is None or (isinstance(value, str) and value.strip().lower() in NULL)


def expand_path(text: str) -> str:
    """Return a path with ``~`` at its start and each ``$VARIABLE`` replaced; addresses stay as they are.

    Raises:
        ValueError: a variable that is not set, or a user who is not known.
    """
    if "://" in text:
        return text
    unset = [name for pair in _VARIABLE.findall(text) for name in pair if name and name not in os.environ]
    if unset:
        raise ValueError(
            f"{reprlib.repr(text)} names the environment variable {unset[0]}, which is not set; set it, or write the "
            "path out"
        )
    expanded = os.path.expanduser(os.path.expandvars(text))
    if expanded.startswith("~"):
        raise ValueError(f"{reprlib.repr(text)}: {expanded.split('/')[0]} is not the home folder of a known user")
    return expanded


def read_duration(text: str) -> float:
    """Return the seconds in a text such as ``6h``, ``90m``, ``300s`` or ``1h30m``; ``0`` is none.

    Raises:
        ValueError: the text is not a duration.
    """
    parts = _DURATION.fullmatch(text.strip().lower())
    if text.strip() == "0":
        return 0.0
    if parts is None or not any(parts.groups()):
        raise ValueError(f"{reprlib.repr(text)}, not a time such as 6h, 90m, 300s or 1h30m (0 = off)")
    return sum(float(number) * unit for number, unit in zip(parts.groups(), (3600, 60, 1), strict=True) if number)


def read_arguments(text: str) -> dict[str, Any]:
    """Return the arguments in a text such as ``eps=1e-6, betas=(0.9, 0.99)``; nothing in it is executed.

    Raises:
        ValueError: the text is not a list of names with plain values.
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if isinstance(call, ast.Call) and not call.args and all(word.arg for word in call.keywords):
            return {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass  # the message below says what was expected
    raise ValueError(f"{reprlib.repr(text)} is not a list such as eps=1e-8, caution=True")


def in_interval(number: float, interval: str) -> bool:
    """Return whether ``number`` lies in an interval such as ``[0, 1)``; NaN lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in TRUE + FALSE:
        return value.strip().lower() in TRUE
    raise ValueError(f"{reprlib.repr(value)} is not true or false")


def _to_number(value: Any, kind: type[int] | type[float]) -> float:
    try:
        if isinstance(value, (int, kind, str)) and not isinstance(value, bool):
            number = kind(value)
            if kind is int and abs(number) >= 2**63:
                raise OverflowError
            return number
    except OverflowError:
        raise ValueError(f"{reprlib.repr(value)} does not fit into 64 bits") from None
    except ValueError:
        pass  # the message below says what was expected
    raise ValueError(f"{reprlib.repr(value)} is not a {'whole number' if kind is int else 'number'}")


def _to_text(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return "" if text in ("null", "~", "None") else text
    raise ValueError(f"{reprlib.repr(value)} is not text")


def _to_choice(text: str, choices: Sequence[str]) -> str:
    if not choices:
        return text
    by_lower = {choice.lower(): choice for choice in choices}
    if text.lower() in by_lower:
        return by_lower[text.lower()]
    for choice in choices:
        prefix = choice.removesuffix("NAME")
        if prefix.endswith(":") and text.lower().startswith(prefix) and text != prefix:
            return prefix + text[len(prefix) :]
    known = ", ".join(choice or "''" for choice in choices)
    raise ValueError(f"{reprlib.repr(text)} is unknown; known: {known}{did_you_mean(text, filter(None, choices))}")


def _to_numbers(value: Any, default: Sequence[Any], *, any_length: bool) -> Sequence[Any]:
    """Read a list of as many numbers as the default has, from a sequence or from text such as ``(0.9, 0.99)``."""
    if isinstance(value, str):
        value = [part for part in value.strip("()[] ").split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{reprlib.repr(value)} is not a list of {len(default)} numbers")
    if any_length and value:
        default = [default[0]] * len(value) if isinstance(default, list) else (default[0],) * len(value)
    if len(value) != len(default):
        raise ValueError(f"{reprlib.repr(value)} has {len(value)} entries instead of {len(default)}")
    return type(default)(convert(item, like) for item, like in zip(value, default, strict=True))
