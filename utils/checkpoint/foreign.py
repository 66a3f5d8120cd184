"""Which classes of other projects a file may name: all that are data, since nothing of them is imported or called.

Training scripts put their arguments, metrics and paths next to the weights. Each such class is read as ``Unknown`` of
``utils.checkpoint.pickled``, an inert stand-in. A function or class of Python's standard library that is not plain
data has no use in a checkpoint: a file that names one was made to run code, and is refused.
"""

import sys
from collections.abc import Collection

# What other projects' files hold of the standard library, by module.
_STANDARD_DATA = {
    "argparse": "Namespace",
    "builtins": "object list dict tuple int float str bool bytes slice range frozenset getattr",  # getattr: enums
    "collections": "defaultdict deque Counter",
    "copyreg": "_reconstructor __newobj_ex__",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "functools": "partial",
    "pathlib": "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath",
    "pathlib._local": "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath",
    "types": "SimpleNamespace",
    "uuid": "UUID",
}


def refused_names(names: Collection[str]) -> list[str]:
    """Return those of the dotted names that no checkpoint of another project needs, sorted."""
    return sorted(name for name in names if _is_standard(name) and not _is_data(name))


def _is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def _is_data(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return attribute in _STANDARD_DATA.get(module, "").split()
