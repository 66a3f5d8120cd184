"""The order of the classes, which decides what label each one has."""

from pathlib import Path

import numpy as np

from data.sources.base import Source

CLASS_FILE = "classes.txt"


def order_classes(source: Source, order: str, root: str | Path) -> None:
    """Number the classes of a source anew, in place.

    Args:
        source: its classes are in the order of their names as text.
        order: DATA.CLASS_ORDER: ``text`` leaves them, ``numeric`` sorts them as numbers (2 before 10), ``file`` takes
            the order of the lines of ``root/classes.txt``, which may name further classes.
        root: DATA.DATA_PATH.

    Raises:
        ValueError: a name is not a number, or the file does not list each name once.
        FileNotFoundError: there is no such file.
    """
    if order == "text":
        return
    names = _numeric(source.classes) if order == "numeric" else _listed(Path(root) / CLASS_FILE, source.classes)
    numbers = {name: number for number, name in enumerate(names)}
    source.targets = np.array([numbers[name] for name in source.classes], dtype=np.int64)[source.targets]
    source.classes = names


def _numeric(classes: list[str]) -> list[str]:
    other = next((name for name in classes if not (name.isascii() and name.isdigit())), None)
    if other is not None:
        raise ValueError(f"DATA.CLASS_ORDER is numeric, but the class {other!r} is not a number; take text or file")
    return sorted(classes, key=int)


def _listed(file: Path, classes: list[str]) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"DATA.CLASS_ORDER is file, but there is no {file} (one class name per line)")
    names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    missing = [name for name in classes if name not in set(names)]
    if missing or len(set(names)) != len(names):
        what = f"does not list the class {missing[0]!r}" if missing else "lists a class twice"
        raise ValueError(f"{file} {what}; DATA.CLASS_ORDER file needs each class name on one line")
    return names
