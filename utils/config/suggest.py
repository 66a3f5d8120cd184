"""The nearest known name, for messages about an unknown one."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str], show: Callable[[str], Any] = str) -> str:
    """Return ``"; did you mean X?"`` for the end of a message, or an empty text where no known name is near.

    Upper and lower case do not matter. A dotted name may have the wrong section before its last part.

    Args:
        name: the unknown name.
        known: the names that would have been possible.
        show: how the message writes a known name.
    """
    by_upper = {k.upper(): k for k in known}
    leaves = {k.rpartition(".")[2]: k for k in reversed(by_upper)}  # the first of several wins
    word = name.upper()
    leaf = word.rpartition(".")[2]
    found = (
        [k for k in by_upper if k == word]
        or [k for k in by_upper if k.rpartition(".")[2] == leaf][:2]
        or difflib.get_close_matches(word, by_upper, n=1, cutoff=0.7)
        or [leaves[k] for k in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)]
    )
    return f"; did you mean {' or '.join(str(show(by_upper[k])) for k in found)}?" if found else ""
