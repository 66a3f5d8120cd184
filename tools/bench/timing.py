"""Paired timing: all contestants take turns in one process, so that what else the machine does hits them alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from tools.bench.candidates import Candidate, Setting, build_workload

_MAX_REPEATS = 1000


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a few values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise ``values``."""
        return cls(statistics.median(values), min(values), max(values))


class Stopwatch:
    """Times calls on a device: wall or CPU time of the host, or CUDA events.

    Args:
        device: where the work happens.
        clock: ``wall``; ``cpu``, the process's CPU time, which others' load disturbs less but which counts every
            thread; or ``auto``: CPU time with one thread, wall time otherwise. A GPU is timed by its events.
    """

    def __init__(self, device: torch.device, clock: str = "auto") -> None:
        self._device = device
        if clock == "auto":
            clock = "cpu" if torch.get_num_threads() == 1 else "wall"
        self.clock = "CUDA events" if device.type == "cuda" else {"cpu": "CPU time", "wall": "wall time"}[clock]
        self._now = time.process_time if clock == "cpu" else time.perf_counter

    def seconds(self, run: Callable[[], object], repeats: int = 1) -> float:
        """Seconds a call, the mean over ``repeats`` calls in a row."""
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000 / repeats
        start = self._now()
        for _ in range(repeats):
            run()
        return (self._now() - start) / repeats


def measure_paired(
    runs: Sequence[Callable[[], object]], stopwatch: Stopwatch, *, rounds: int, min_seconds: float, warm_up: int = 2
) -> list[list[float]]:
    """Time several callables against each other.

    Each is warmed up, then in every round each is called often enough to take ``min_seconds``; the order is turned
    round from one round to the next.

    Args:
        runs: the contestants.
        stopwatch: the clock.
        rounds: measurements of each.
        min_seconds: length of one measurement.
        warm_up: calls before the first round.

    Returns:
        Seconds a call, ``[contestant][round]``.
    """
    repeats = []
    for run in runs:
        for _ in range(warm_up):
            run()
        once = stopwatch.seconds(run)
        repeats.append(min(_MAX_REPEATS, max(1, round(min_seconds / max(once, 1e-6)))))
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            times[index].append(stopwatch.seconds(runs[index], repeats[index]))
    return times


def paired_ratio(times: Sequence[float], baseline: Sequence[float]) -> Spread:
    """How many times as fast as the baseline, from the rounds' own ratios."""
    return Spread.of([other / own for own, other in zip(times, baseline, strict=True)])


def gpu_peak(run: Callable[[], object], before: int) -> int:
    """Peak of the allocated GPU memory in a call of ``run``, beyond the ``before`` bytes of what else there is."""
    run()  # makes the optimizer's state
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def resident_growth(candidate: Candidate, setting: Setting, threads: int) -> int:
    """Bytes by which the peak resident memory of a fresh process grows over two calls."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_growth, candidate, setting, threads).result()


def _growth(candidate: Candidate, setting: Setting, threads: int) -> int:
    torch.set_num_threads(threads)
    workload = build_workload(candidate, setting)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _peak_resident()
    workload.run()
    workload.run()
    return _peak_resident() - before


def _peak_resident() -> int:
    """Peak resident size of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
