"""Inert stand-ins for the classes that files of other projects name.

Training scripts put their arguments, metrics and paths next to the weights. PyTorch's weights-only mode refuses the
whole file then. Here each such class is replaced by one that only keeps what it is given: nothing that a file names is
imported or called. A function or class of Python's standard library that is not plain data is still refused, because
a checkpoint has no use for it.
"""

import collections
import re
import sys
from typing import Any

# What other projects' files hold of the standard library.
_STANDARD_DATA = {
    "argparse": "Namespace",
    "collections": "defaultdict deque",
    "types": "SimpleNamespace",
    "functools": "partial",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "copyreg": "_reconstructor",
    "datetime": "date datetime time timedelta timezone",
    "builtins": "object list dict tuple int float str bool bytes slice range frozenset",
    "pathlib": "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath",
    "pathlib._local": "PosixPath PurePosixPath WindowsPath PureWindowsPath",
}
_UNKNOWN = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")
_FILLED = re.compile(r"Can only (\w+) (?:for|to|lists).*?but got <class 'stand_in\.([\w.]+)'>", re.DOTALL)
_LARGEST = 256  # classes in one file


class StandIn:
    """Keeps the arguments and the state of an object of another project's class."""

    def __new__(cls, *args: Any) -> "StandIn":
        instance = super().__new__(cls)
        instance.args = args
        return instance

    def __init__(self, *args: Any) -> None:
        """Do nothing: ``__new__`` has kept the arguments."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Mapping:
    """Makes a plain mapping in place of an object that is filled like one (``defaultdict``, configurations)."""

    def __new__(cls, *args: Any) -> collections.OrderedDict:
        return collections.OrderedDict()


class _Sequence:
    """Makes a list in place of an object that is filled like one (``deque``)."""

    def __new__(cls, *args: Any) -> list:
        return []


class StandIns:
    """The stand-ins that one file needs, found one by one from the messages of the weights-only mode."""

    def __init__(self) -> None:
        self._classes: dict[str, type] = {}

    def globals(self) -> list[tuple[type, str]]:
        """Return them in the form that ``torch.serialization.safe_globals`` takes."""
        return [(stand_in, name) for name, stand_in in self._classes.items()]

    def add_missing(self, message: str) -> bool:
        """Add what ``message`` asks for; return whether there was something to add and it is harmless."""
        if len(self._classes) >= _LARGEST:
            return False
        if filled := _FILLED.search(message):
            kind = _Sequence if filled[1].startswith(("append", "extend")) else _Mapping
            self._classes[filled[2]] = type(filled[2], (kind,), {"__module__": "stand_in"})
            return True
        unknown = _UNKNOWN.search(message)
        if unknown is None:
            return False
        name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"  # PyTorch leaves "builtins." out
        if name in self._classes:
            return False
        module, _, attribute = name.rpartition(".")
        standard = module.split(".")[0] in sys.stdlib_module_names
        if standard and attribute not in _STANDARD_DATA.get(module, "").split():
            return False
        self._classes[name] = type(name, (StandIn,), {"__module__": "stand_in"})
        return True
