"""The loader and its worker processes: signals, threads, what happens when they or their parent die."""

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from data.loading.collate import as_tensors, collate_arrays
from utils.errors import RunError, one_line
from utils.runtime import JOB_SIGNALS

_SIGNAL_SECONDS = 0.5
_KILL_SECONDS = 5  # a process in an uninterruptible read of a dead network disk ends later, or never


class WorkerInit:
    """Start-up of a data worker, picklable for every start method.

    A worker ignores the signals that ask a job to stop: a batch system or a terminal sends them to all processes of the
    job, and the training process needs its workers until it has reached the end of an update and saved. The price is
    that Python's own clean-up at exit, which sends SIGTERM to the remaining workers and waits for them, would wait
    forever; so the parent kills them first (``kill_remaining``). A worker whose parent was killed notices it by itself
    within seconds.
    """

    def __init__(self, num_workers: int) -> None:
        self._pids = torch.zeros(max(num_workers, 1), dtype=torch.int64).share_memory_()

    def __call__(self, worker_id: int) -> None:
        for number in JOB_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
        torch.set_num_threads(1)
        self._pids[worker_id] = os.getpid()

    def kill_remaining(self) -> None:
        """Kill the workers that still run. Call it in the main thread of the process that started them."""
        pids = set(self._pids.tolist())
        remaining = [child for child in multiprocessing.active_children() if child.pid in pids]
        if not remaining:
            return
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report their deaths as an error
        for child in remaining:
            child.kill()
        for child in remaining:
            child.join(_KILL_SECONDS)
        signal.signal(signal.SIGCHLD, handler)


class ImageLoader(DataLoader):
    """DataLoader of an ImageDataset: yields (images, targets, indices) as ``data.loading.collate.collate`` makes them.

    Its workers survive the signals to a job, never outlive it, and their failures give advice. They persist from one
    pass to the next. An error while batches are fetched stops them; otherwise ``close`` does, or the end of the
    process. The global random streams are left alone.

    Args:
        dataset: an ImageDataset.
        num_workers: number of worker processes; 0 loads in this process.
        options: further arguments of DataLoader.
    """

    def __init__(self, dataset: Dataset, *, num_workers: int, **options: object) -> None:
        self._start_up = WorkerInit(num_workers)
        super().__init__(
            dataset,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=collate_arrays,
            worker_init_fn=self._start_up,
            generator=torch.Generator(),  # otherwise each pass would draw from the global stream
            **options,
        )
        if num_workers:
            atexit.register(self._start_up.kill_remaining)

    def __iter__(self) -> Iterator:
        # a worker inherits the mask, so a signal before its start-up has run does not kill it
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        try:
            iterator = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            yield from map(as_tensors, _batches(iterator))
        except Exception as error:
            advice = _advice(str(error))
            if advice is not None:
                self._start_up.kill_remaining()  # torch would wait five seconds for each one that hangs
            self._stop(iterator)
            if advice is None:
                raise
            raise RunError(f"{one_line(error)} {advice}") from error

    def close(self) -> None:
        """Stop the workers. A later pass starts new ones.

        Do not leave this to the garbage collector where an exception keeps the loader alive: it finalises the parts of
        such a cycle in any order, and an iterator that is finalised after its pipes writes to, and closes, files that
        others have opened since.
        """
        if self._iterator is not None:
            self._stop(self._iterator)

    def _stop(self, iterator: object) -> None:
        shutdown = getattr(iterator, "_shutdown_workers", None)  # absent without workers
        if shutdown is not None:
            shutdown()
        self._iterator = None


def _batches(iterator: Iterator) -> Iterator:
    """Yield from a DataLoader's iterator; a lost connection to a worker raises the RuntimeError that its death does."""
    try:
        yield from iterator
    except (OSError, EOFError) as error:
        time.sleep(_SIGNAL_SECONDS)  # meanwhile torch's handler of SIGCHLD may raise a better error, naming the signal
        raise RuntimeError(f"DataLoader worker exited unexpectedly: {error!r}") from error


def _advice(message: str) -> str | None:
    """Return what to do about a failure of the worker processes themselves, None for any other error."""
    if "DataLoader timed out" in message:
        return (
            "No batch arrived within DATA.LOADER_TIMEOUT seconds: does the storage of DATA.DATA_PATH hang? Slow "
            "storage needs a larger DATA.LOADER_TIMEOUT (0 = wait forever) or more DATA.NUM_WORKERS."
        )
    if "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
        return (
            "A data worker process died. Without an error of its own it was most likely killed for lack of memory "
            "(RAM, or /dev/shm in a container): lower DATA.NUM_WORKERS or DATA.BATCH_SIZE, or start with --shm-size."
        )
    return None
