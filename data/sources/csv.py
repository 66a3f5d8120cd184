"""Images that a CSV file lists: a header ``path,label``, then one image a line.

Paths are relative to the folder of the file. A label is the name of a class, also where it is a number. Commas,
semicolons and tabs separate; quotes, a byte order mark, UTF-16 and CRLF are read, as spreadsheets write them.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.sources.base import FileSource
from data.sources.listing import some
from data.sources.zip import decode_text

COLUMNS = ("path", "label")
_SEPARATORS = ",;\t"


class Row(NamedTuple):
    """One image of a CSV file, and the line that names it."""

    path: str
    label: str
    line: int


class CsvSource(FileSource):
    """The images that a CSV file lists, in its order.

    Args:
        file: the CSV file.
        classes: number the classes as in this list, which may name more of them than the file has. A list that lacks
            one of the file's classes is not used.
        images: ``as_array`` and ``channels`` of ``FileSource``.

    Raises:
        FileNotFoundError: no such file, or it lists images that are not there.
        ValueError: it is empty, has another header, an incomplete line, or an image twice; names the file and the line.
    """

    def __init__(self, file: str | Path, *, classes: Sequence[str] = (), **images: Any) -> None:
        file = Path(file)
        rows = read_rows(file)
        missing = [row for row in rows if not os.path.isfile(file.parent / row.path)]
        if missing:
            raise FileNotFoundError(
                f"{file} lists {len(missing)} images of {len(rows)} that are not there, the first in line "
                f"{missing[0].line}: {file.parent / missing[0].path}; paths are relative to the folder of the CSV file"
            )
        found = sorted({row.label for row in rows})
        classes = classes if set(found) <= set(classes) else found
        numbers = {name: number for number, name in enumerate(classes)}
        targets = [numbers[row.label] for row in rows]
        super().__init__(file.parent, [row.path for row in rows], targets, classes, **images)


def read_rows(file: Path) -> list[Row]:
    """Return what a CSV file lists; columns other than ``path`` and ``label`` are ignored.

    Raises:
        FileNotFoundError, ValueError: see ``CsvSource``; whether the images are there is not checked.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"no file {file}: DATA.DATASET csv needs train.csv and val.csv in DATA.DATA_PATH, or with DATA.HOLDOUT "
            "0.2 train.csv alone, or a single CSV file as DATA.DATA_PATH"
        )
    lines = decode_text(file).split("\n")
    if not any(line.strip() for line in lines):
        raise ValueError(f"{file} is empty; expected the header {','.join(COLUMNS)}, then one image a line")
    separator = max(_SEPARATORS, key=lines[0].count)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    try:
        header, *table = [(cells, reader.line_num) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}; is a quote left open above?") from error
    columns = [name.strip().lower() for name in header[0]]
    twice = [name for name in COLUMNS if columns.count(name) > 1]
    if twice:
        raise ValueError(f"{file}: the header {lines[0]!r} names the column {twice[0]!r} twice")
    if not set(COLUMNS) <= set(columns):
        raise ValueError(f"{file}: the first line is {lines[0]!r}, not the header {','.join(COLUMNS)}")
    places = [columns.index(name) for name in COLUMNS]
    rows = []
    for cells, line in table:
        if any(cell.strip() for cell in cells):
            path, label = (cells[place].strip() if place < len(cells) else "" for place in places)
            if not path or not label:
                what = "label" if path else "path"
                raise ValueError(f"{file}, line {line}: no {what} in {separator.join(cells)!r}")
            rows.append(Row(_relative(path.replace("\\", "/"), file.parent), label, line))
    if not rows:
        raise ValueError(f"{file} lists no images: there is no line after the header")
    _refuse_repeated(file, rows)
    return rows


def _relative(path: str, folder: Path) -> str:
    """Return a path relative to the folder if it lies below it, so that each image has one name wherever it is."""
    return os.path.normpath(path).removeprefix(os.path.join(os.path.abspath(folder), ""))


def csv_classes(file: Path) -> list[str]:
    """Return the sorted class names of a CSV file; none if there is no such file."""
    return sorted({row.label for row in read_rows(file)}) if file.is_file() else []


def _refuse_repeated(file: Path, rows: Sequence[Row]) -> None:
    first: dict[str, Row] = {}
    repeated = [row for row in rows if first.setdefault(row.path, row) is not row]
    if repeated:
        row = repeated[0]
        raise ValueError(
            f"{file} lists {len(repeated)} images more than once ({some(row.path for row in repeated)}): line "
            f"{first[row.path].line} gives {row.path!r} the label {first[row.path].label!r}, line {row.line} the label "
            f"{row.label!r}; keep one line for each image"
        )
