"""Work and cores that the processes of one machine share."""

import os
from collections.abc import Callable

from utils.errors import RunError, one_line
from utils.runtime.distributed import attempt, gather_objects, get_local_rank, get_local_world_size


def once_per_machine(action: Callable[[], object], *, what: str) -> None:
    """Run ``action`` in the first process of each machine; all processes return, or raise, together.

    Args:
        action: what to do.
        what: its name, for the error message.

    Raises:
        RunError: ``action`` failed on some machine; the message repeats the reason.
    """
    failure = ""
    _, error = attempt(action) if get_local_rank() == 0 else (None, None)
    if error is not None:
        failure = f"{what} failed: {one_line(error)}"
    failures = [text for text in gather_objects(failure) if text]  # also the barrier that the others wait at
    if failures:
        raise RunError("; ".join(sorted(set(failures)))) from error


def usable_cores(*, shared: bool = True) -> int:
    """Return the number of CPU cores that this process may use, at least 1.

    Args:
        shared: only this process's share of them, the machine's other processes taking theirs; else all.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // get_local_world_size()) if shared else cores
