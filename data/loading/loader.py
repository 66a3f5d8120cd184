"""The loader and its worker processes: signals, threads, what they need, what happens when they or their parent die."""

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Listener

import torch
from torch.utils.data import DataLoader, Dataset

from data.loading.collate import as_tensors, collate_arrays
from data.loading.shared_memory import FULL_SHM, shared_zeros
from utils.errors import RunError, one_line
from utils.runtime import JOB_SIGNALS

_SIGNAL_SECONDS = 0.5
_FILES, _FILES_PER_WORKER = 4, 4  # that this process opens: queues, sentinels, batches in flight
_LOCKS, _LOCKS_PER_WORKER = 8, 3  # of the queue of results and the event of the end, and of each worker's queue
_NO_FILES = ("Too many open files", "items of ancdata")  # the second is how a socket loses a file that nobody can open
_NO_SHARED_MEMORY = ("No space left on device", "unable to allocate shared memory")
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
        self._pids = shared_zeros(max(num_workers, 1), torch.int64)

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
        iterator = None
        try:
            iterator = self._start()
            yield from map(as_tensors, _batches(iterator))
        except Exception as error:
            advice = _advice(str(error))
            if advice is not None:
                self._start_up.kill_remaining()  # torch would wait five seconds for each one that hangs
            self._stop(iterator)
            if advice is not None:
                raise RunError(f"{one_line(error).rstrip('. ')}. {advice}") from error
            original = _original(error)
            if original is None:
                raise
            raise original from error

    def _start(self) -> Iterator:
        """Return an iterator over the batches of a pass; its workers are started if need be."""
        if self.num_workers and self._iterator is None:
            _try_sockets()
            _try_open_files(self.num_workers)
            _try_locks(self.num_workers)
        # a worker inherits the mask, so a signal before its start-up has run does not kill it
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

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


def _try_sockets() -> None:
    """Raise RunError unless a socket can be made where the workers make theirs, which pass on memory of batches."""
    if torch.multiprocessing.get_sharing_strategy() != "file_descriptor":
        return
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise RunError(
            f"data workers need sockets in the folder of temporary files, TMPDIR {os.environ.get('TMPDIR', '')!r}: "
            f"{error}. Set TMPDIR to a short path on a local disk, such as /tmp, or DATA.NUM_WORKERS 0"
        ) from error


def _try_locks(num_workers: int) -> None:
    """Raise OSError unless /dev/shm has room for the locks of the workers' queues."""
    locks = [multiprocessing.Semaphore() for _ in range(_LOCKS + _LOCKS_PER_WORKER * num_workers)]
    locks.clear()


def _try_open_files(num_workers: int) -> None:
    """Raise OSError unless this process may open the files that the workers need."""
    opened = []
    try:
        for _ in range(_FILES + _FILES_PER_WORKER * num_workers):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for file in opened:
            os.close(file)


def _original(error: Exception) -> Exception | None:
    """Return the error of a data worker as it was raised, where the message of ``error`` is the worker's traceback."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    text = str(error)
    _, found, message = text.rpartition(f"\n{name}: ")
    if not found or not text.startswith(f"Caught {kind.__name__} in DataLoader worker"):
        return None
    return kind(message.strip())


def _batches(iterator: Iterator) -> Iterator:
    """Yield from a DataLoader's iterator; a lost connection to a worker raises the RuntimeError that its death does."""
    try:
        yield from iterator
    except (OSError, EOFError) as error:
        if str(error).startswith("Caught "):  # raised in a worker, which lives on
            raise
        time.sleep(_SIGNAL_SECONDS)  # meanwhile torch's handler of SIGCHLD may raise a better error, naming the signal
        raise RuntimeError(f"DataLoader worker exited unexpectedly: {error!r}") from error


def _advice(message: str) -> str | None:
    """Return what to do about a failure of the worker processes themselves, None for any other error."""
    if any(text in message for text in _NO_FILES):
        return (
            "This process may not open as many files as its data workers need: raise the limit with `ulimit -n 4096`, "
            "or lower DATA.NUM_WORKERS"
        )
    if any(text in message for text in _NO_SHARED_MEMORY):
        return FULL_SHM
    if "DataLoader timed out" in message:
        return (
            "No batch arrived within DATA.LOADER_TIMEOUT seconds: does the storage of DATA.DATA_PATH hang? Slow "
            "storage needs a larger DATA.LOADER_TIMEOUT (0 = wait forever) or more DATA.NUM_WORKERS"
        )
    if "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
        return (
            "A data worker process died. Without an error of its own it was most likely killed for lack of memory "
            "(RAM, or /dev/shm in a container): lower DATA.NUM_WORKERS or DATA.BATCH_SIZE, or start with --shm-size"
        )
    return None
