"""Memory of a candidate: what a GPU has allocated at most, or the growth of a fresh process."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from tools.bench.candidates import Candidate, Setting, build_workload


def gpu_peak(run: Callable[[], object], before: int) -> int:
    """Return the peak of the allocated GPU memory during a call of ``run``, in bytes beyond ``before``."""
    run()  # creates the optimizer's state
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def resident_growth(candidate: Candidate, setting: Setting) -> int:
    """Return the bytes by which the peak resident memory of a fresh process grows over two calls."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_growth, candidate, setting, torch.get_num_threads()).result()


def _growth(candidate: Candidate, setting: Setting, threads: int) -> int:
    torch.set_num_threads(threads)
    workload = build_workload(candidate, setting)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak_resident()
    workload.run()
    workload.run()
    return _peak_resident() - before


def _peak_resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
