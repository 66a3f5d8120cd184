"""Data worker processes: signals, threads, and the end of their parent."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader


class WorkerInit:
    """Start-up of a data worker, picklable for every start method.

    A worker ignores SIGTERM, SIGINT and SIGUSR1: a batch system or a terminal sends them to all processes of a job, and
    the training process needs its workers until it has reached the end of an update and saved. The price is that
    Python's own clean-up at exit, which sends SIGTERM to remaining workers and waits for them, would wait for ever; so
    the parent kills them first (``kill_remaining``). A worker whose parent was killed notices within seconds by itself.
    """

    def __init__(self, num_workers: int) -> None:
        self._pids = torch.zeros(max(num_workers, 1), dtype=torch.int64).share_memory_()

    def __call__(self, worker_id: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        torch.set_num_threads(1)
        self._pids[worker_id] = os.getpid()

    def kill_remaining(self) -> None:
        """Kill the workers that still run; for the exit of the process that started them."""
        pids = set(self._pids.tolist())
        remaining = [child for child in multiprocessing.active_children() if child.pid in pids]
        if remaining:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their deaths as an error
        for child in remaining:
            child.kill()


class ImageLoader(DataLoader):
    """DataLoader whose workers survive the signals of a job, never outlive it, and whose failures give advice."""

    def __init__(self, *args, num_workers: int, **kwargs) -> None:
        start_up = WorkerInit(num_workers)
        super().__init__(*args, num_workers=num_workers, worker_init_fn=start_up, **kwargs)
        if num_workers:
            atexit.register(start_up.kill_remaining)

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            advice = _advice(str(error))
            if advice is None:
                raise
            raise RuntimeError(f"{error}\n{advice}") from error


def _advice(message: str) -> str | None:
    """Return what to do about a failure of the worker processes themselves, None for any other error."""
    if "DataLoader timed out" in message:
        return (
            "No batch arrived within DATA.LOADER_TIMEOUT seconds: does the storage of DATA.DATA_PATH hang? Slow "
            "storage needs a larger DATA.LOADER_TIMEOUT (0 = wait for ever) or more DATA.NUM_WORKERS."
        )
    if "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
        return (
            "A data worker process died. Without an error of its own it was most likely killed for lack of memory "
            "(RAM, or /dev/shm in a container): lower DATA.NUM_WORKERS or DATA.BATCH_SIZE, or start with --shm-size."
        )
    return None
