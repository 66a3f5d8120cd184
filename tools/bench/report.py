"""What a benchmark prints and stores: the circumstances of the measurement and its tables."""

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
        settings: further values for the JSON file.
    """

    title: str
    columns: Sequence[tuple[str, str]]
    rows: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return the table as aligned text, first column to the left, the others to the right."""
        lines = [[heading for heading, _ in self.columns]]
        lines += [[_cell(row.get(key)) for _, key in self.columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = []
        for first, *others in lines:
            cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
            aligned.append("  ".join(cells).rstrip())
        return "\n".join(["", self.title, *aligned])


class Report:
    """Prints the circumstances and each table as it is finished.

    Args:
        device: where the measured work runs.
        json_file: also keeps everything; written after each table. None for no file.
    """

    def __init__(self, device: torch.device, json_file: Path | None) -> None:
        self._json_file = json_file
        self._content = {"command": sys.argv, "environment": environment(device), "tables": []}
        print(f"command    {' '.join(sys.argv)}")
        for key, value in self._content["environment"].items():
            print(f"{key:10} {value}")

    def add(self, table: Table) -> None:
        """Print ``table`` and write the file."""
        print(table.text(), flush=True)
        self._content["tables"].append(asdict(table))
        if self._json_file is not None:
            self._json_file.parent.mkdir(parents=True, exist_ok=True)
            self._json_file.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


def environment(device: torch.device) -> dict[str, str]:
    """Return the circumstances that a measured speed depends on."""
    facts = {
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{torch.get_num_threads()} of {len(os.sched_getaffinity(0))} usable cores",
        "load": f"{os.getloadavg()[0]:.1f} in the last minute",
        "allocator": _allocator(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
    }
    if device.type == "cuda":
        facts["cuda"] = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return facts


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _allocator() -> str:
    """Return the name of the process's malloc, with the environment variables that steer it."""
    mapped = Path("/proc/self/maps").read_text().splitlines()
    libraries = {Path(line.split()[-1]).name for line in mapped if "/" in line}
    loaded = [name for name in _ALLOCATORS if any(name in library for library in libraries)]
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_ALLOCATOR_VARIABLES)]
    return ", ".join([" and ".join(loaded) or platform.libc_ver()[0] or "libc", *(variables or ["default settings"])])


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Return the abbreviated commit of the code, marked where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown (not a git repository)"
