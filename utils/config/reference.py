"""The reference of all keys as a page: ``python -m utils.config.reference > docs/CONFIG.md``."""

import sys
from itertools import groupby

from utils.config.keys import KEYS, Key

HEAD = """\
<!-- Written by: python -m utils.config.reference > docs/CONFIG.md. Change utils/config/keys.py, not this page. -->
# Configuration

Every key can be set in a config file (`--cfg`), with `--opts KEY VALUE`, and some with a flag of their own. A flag
wins over `--opts`, `--opts` over the file, and the file over the files that it names under `BASE`. Add
`--print-config` to a command to see the values that it would use, and where each of them was set.

- **Key**: those with a + are not in the published code; their defaults keep its behaviour.
- **Allowed**: names, in upper or lower case, or an interval for each number; `[` and `]` include the end, `(` and `)`
  exclude it.
- **Changes**: `weights` = can change the trained weights, so that a resumed run refuses another value without
  `--allow-change KEY`; `result` = changes the reported accuracy, but may differ on resume; `-` = neither.
"""
COLUMNS = ("Key", "Default", "Allowed", "Meaning", "Changes", "Flag")


def reference() -> str:
    """Return the text of docs/CONFIG.md."""
    parts = [HEAD]
    for section, keys in groupby(KEYS.values(), key=lambda key: key.name.split(".")[0] if "." in key.name else ""):
        rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, keys)]
        parts.append(f"\n## {section or 'The run'}\n\n")
        parts.extend(f"| {' | '.join(row)} |\n" for row in rows)
    return "".join(parts)


def _cells(key: Key) -> tuple[str, ...]:
    """Return the cells of a key's row, in the order of ``COLUMNS``."""
    idle = f"; no effect where {key.idle_when.reason}" if key.idle_when else ""
    return (
        f"`{key.name}`{' +' if key.ours else ''}",
        _code(key.default),
        ", ".join(map(_code, key.choices)) or (f"`{key.allowed}`" if key.allowed else _type(key)),
        key.help + idle,
        {"nothing": "-"}.get(key.affects, key.affects),
        f"`{key.flag.split()[0]}`" if key.flag else "",
    )


def _code(value: object) -> str:
    return f"`{value}`" if value != "" else "empty"


def _type(key: Key) -> str:
    return "`True`, `False`" if isinstance(key.default, bool) else "text"


if __name__ == "__main__":
    sys.stdout.write(reference())
