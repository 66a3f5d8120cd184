"""What a benchmark says about itself and its results: the circumstances, a table, a JSON file."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch

ROOT = Path(__file__).resolve().parents[2]
_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")
_ALLOCATOR_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "TCMALLOC_", "LD_PRELOAD", "PYTORCH_ALLOC_CONF")


@dataclass
class Table:
    """Results that belong together.

    Attributes:
        title: one line: what was done, with what, how it was timed.
        columns: (heading, key of the row) pairs.
        rows: values by key; text is printed as it is.
        notes: lines below the table.
        facts: further values for the JSON file.
    """

    title: str
    columns: Sequence[tuple[str, str]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The table as aligned text, first column to the left, the others to the right."""
        lines = [[heading for heading, _ in self.columns]]
        lines += [[_cell(row.get(key)) for _, key in self.columns] for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        aligned = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join(["", self.title, *aligned, *self.notes])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def environment(device: torch.device) -> dict[str, str]:
    """The circumstances that decide about speed."""
    threads = f"{torch.get_num_threads()} of {len(os.sched_getaffinity(0))} usable cores"
    facts = {
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": threads,
        "load": f"{os.getloadavg()[0]:.1f} in the minute before",
        "allocator": allocator(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
    }
    if device.type == "cuda":
        facts["cuda"] = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return facts


def allocator() -> str:
    """Name of the process's malloc, with the variables that steer it."""
    mapped = Path("/proc/self/maps").read_text().splitlines()
    libraries = {Path(line.split()[-1]).name for line in mapped if "/" in line}
    loaded = [name for name in _ALLOCATORS if any(name in library for library in libraries)]
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_ALLOCATOR_VARIABLES)]
    return ", ".join([" and ".join(loaded) or platform.libc_ver()[0] or "libc", *(variables or ["default settings"])])


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Abbreviated commit of the code, with a mark if files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown (no git repository)"


def print_environment(facts: dict[str, str]) -> None:
    """Print the circumstances, one a line."""
    print(f"command    {' '.join(sys.argv)}")
    for key, value in facts.items():
        print(f"{key:10} {value}")


def write_json(path: Path, facts: dict[str, str], tables: Sequence[Table]) -> None:
    """Write everything as one JSON object: command, environment, tables."""
    content = {"command": sys.argv, "environment": facts, "tables": [asdict(table) for table in tables]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
