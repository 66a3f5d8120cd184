"""Work that several processes share: once for a machine, or a part of the cores each."""

import os
from collections.abc import Callable

from utils.runtime.distributed import gather_objects, get_local_rank, get_local_world_size


def once_per_machine(action: Callable[[], object], *, what: str) -> None:
    """Run ``action`` in the first process of each machine; all processes return, or raise, together.

    Args:
        action: what to do.
        what: its name, for the error message.

    Raises:
        RuntimeError: ``action`` failed on some machine; the message repeats the reason.
    """
    failure, cause = None, None
    if get_local_rank() == 0:
        try:
            action()
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1:]  # the errors of data workers begin with their traceback
            failure, cause = f"{what} failed: {''.join(reason)} [{type(error).__name__}]", error
    failures = [text for text in gather_objects(failure) if text]  # also the barrier that the others wait at
    if failures:
        raise RuntimeError("; ".join(sorted(set(failures)))) from cause


def usable_cores(*, shared: bool = True) -> int:
    """Number of CPU cores that this process may use: its share of the machine's, or all of them; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // get_local_world_size()) if shared else cores
