"""Does the run wait for its data, and what would help? At most one warning an epoch, which names the bottleneck."""

import logging
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

from utils.runtime import get_local_world_size

logger = logging.getLogger(__name__)

WAIT_SHARE = 0.1  # of an epoch's time
WAIT_SECONDS = 2.0  # in an epoch; less is not worth a word
_BUSY = 0.7  # share of their time from which on the workers' computing, not their reading, is the limit
_STARVED = 0.2  # share of their time that workers wait for a core
_IN_MEMORY = ("CIFAR10", "CIFAR100", "digits")


@dataclass(frozen=True)
class LoaderLoad:
    """What the workers of a loader did during an epoch.

    Attributes:
        workers: their number.
        cores: cores that this process may use.
        computing: share of the time, 0 to 1, that a worker computed, their mean.
        queueing: share of the time that a worker could have computed but had no core.
    """

    workers: int
    cores: int
    computing: float = 0.0
    queueing: float = 0.0


class DataWatch:
    """Watches the data workers of this process during an epoch of training. Make it before the epoch's first batch.

    Args:
        config: frozen config.
        workers: number of the training loader's workers.
    """

    def __init__(self, config, workers: int) -> None:
        self._config = config
        self._workers = workers
        self._start = (time.monotonic(), *worker_times())

    def report(self, wait_share: float, seconds: float) -> None:
        """Warn if the epoch waited for data.

        Args:
            wait_share: share of the epoch's time, 0 to 1, in which the device waited.
            seconds: the epoch's time.
        """
        if wait_share < WAIT_SHARE or wait_share * seconds < WAIT_SECONDS:
            return
        elapsed, computing, queueing = (
            now - then for now, then in zip((time.monotonic(), *worker_times()), self._start, strict=True)
        )
        time_of_all = max(elapsed * self._workers, 1e-9)
        cores = max(1, len(os.sched_getaffinity(0)) // get_local_world_size())
        load = LoaderLoad(self._workers, cores, computing / time_of_all, queueing / time_of_all)
        logger.warning(
            "the training waited for data %.0f %% of the epoch (%.0f s): %s",
            100 * wait_share,
            wait_share * seconds,
            advice(self._config, load),
        )


def advice(config, load: LoaderLoad) -> str:
    """What limits the loader, and what to change."""
    if load.workers == 0:
        return (
            f"images are loaded in the training process itself; set DATA.NUM_WORKERS (-1 takes all {load.cores} "
            "core(s) of this process)"
        )
    state = f"a data worker computes {100 * load.computing:.0f} % of the time"
    if load.computing + load.queueing < _BUSY:
        return (
            f"{state}, so that reading is the limit; move the images to a faster disk or into memory, or read "
            "ahead with more DATA.NUM_WORKERS"
        )
    remedies = []
    if load.queueing > _STARVED:
        state += f" and waits for a core {100 * load.queueing:.0f} %"
        remedies.append("fewer threads and processes for the same cores (OMP_NUM_THREADS, DATA.NUM_WORKERS)")
    elif load.workers < load.cores:
        remedies.append(f"more DATA.NUM_WORKERS ({load.workers} now, {load.cores} cores)")
    data = config.DATA
    if data.CACHE_DECODED == "off" and data.DATASET not in _IN_MEMORY:
        remedies.append("DATA.CACHE_DECODED ram if the decoded images fit into memory")
    if data.PIPELINE != "fast":
        remedies.append("DATA.PIPELINE fast (same pixels)")
    elif not data.FAST_RESIZE:
        remedies.append("DATA.FAST_RESIZE True (pixels differ by rounding)")
    remedies.append("more cores")
    return f"{state}, so that the processor is the limit; {', or '.join(remedies)}"


def worker_times() -> tuple[float, float]:
    """Seconds that the living data workers of this process have computed, and have waited for a core, so far."""
    computed, queued = 0.0, 0.0
    for child in multiprocessing.active_children():
        try:
            computing, queueing, _ = Path(f"/proc/{child.pid}/schedstat").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended, or this system keeps no such account
            continue
        computed += int(computing) * 1e-9
        queued += int(queueing) * 1e-9
    return computed, queued
