"""Measure the time from the command to the first update of the quickstart."""

import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace

from tqdm import trange

from tools.bench.report import ROOT, Report, Table
from tools.bench.timing import Spread

QUICKSTART = "configs/quickstart_digits.yaml"
# What has just been done when the run's log shows a text.
_MILESTONES = {
    "imports, process group, log": " command: ",
    "data": " data: ",
    "model": " update: ",
    "first update": " update 1/",
}
_FIRST_UPDATE_SECONDS = 120


def add_arguments(_parser: ArgumentParser) -> None:
    """Add nothing: the common arguments are enough."""


def run(args: Namespace, report: Report) -> None:
    """Report the seconds to each milestone, and those that importing the libraries takes by itself."""
    seen: dict[str, list[float]] = {name: [] for name in ("(import torch, timm alone)", *_MILESTONES)}
    _first_update()  # afterwards, the files are in memory
    for _ in trange(args.rounds, desc="measure", leave=False):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, timm"], check=True)
        found = {"(import torch, timm alone)": time.perf_counter() - start, **_first_update()}
        for name, seconds in found.items():
            seen[name].append(seconds)
    rows = []
    for name, seconds in seen.items():
        spread = Spread.of(seconds)
        rows.append({"label": name, "median": spread.median, "range": spread.range, "seconds": seconds})
    title = f"start-up of {QUICKSTART}: seconds since the command, {args.rounds} rounds"
    report.add(Table(title, [("", "label"), ("s", "median"), ("min - max", "range")], rows))


def _first_update() -> dict[str, float]:
    """Start the quickstart, note the seconds to each milestone, and end it.

    Raises:
        RuntimeError: it ended earlier.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-u",
            "main.py",
            "--cfg",
            QUICKSTART,
            "--output",
            folder,
            "--opts",
            "PRINT_FREQ",
            "1",
        ]
        start, found = time.perf_counter(), {}
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            for line in process.stdout:
                now = time.perf_counter() - start
                found.update({name: now for name, text in _MILESTONES.items() if text in line and name not in found})
                if len(found) == len(_MILESTONES) or now > _FIRST_UPDATE_SECONDS:
                    break
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    if len(found) < len(_MILESTONES):
        raise RuntimeError(f"the quickstart ended before its first update; run {' '.join(command)} to see why")
    return found
