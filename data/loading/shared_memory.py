"""Items of different lengths in one block of memory that all data workers share, whatever their start method."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.errors import RunError
from utils.runtime import available_memory, get_local_world_size

FULL_SHM = (
    "/dev/shm, where data workers have their locks and counters, is full: make it larger (in a container: "
    "--shm-size 1g) or lower DATA.NUM_WORKERS"
)
_SHM = Path("/dev/shm")
_USABLE_SHARE = 0.9


class SharedItems:
    """A fixed set of byte strings in shared memory; the creator fills it once, before workers start.

    Args:
        lengths: bytes of each item; 0 = not stored.
        purpose: the configuration key that asks for the memory, for the error message.

    Raises:
        ValueError: the items do not fit into the free memory.
    """

    def __init__(self, lengths: Sequence[int], *, purpose: str) -> None:
        self._ends = np.cumsum(lengths, dtype=np.int64)
        total = int(self._ends[-1])
        available = free_memory() * _USABLE_SHARE / get_local_world_size()
        if total > available:
            raise ValueError(
                f"{purpose} needs {total / 1e9:.2f} GB for each process, but only {available / 1e9:.2f} GB of memory "
                "(or of /dev/shm, in a container: --shm-size) are free for it; switch it off or use a larger machine"
            )
        self._block = torch.empty(max(total, 1), dtype=torch.uint8).share_memory_()

    def __getitem__(self, index: int) -> np.ndarray:
        """Return item ``index`` as a writable view, uint8 (length,)."""
        start = self._ends[index - 1] if index else 0
        return self._block.numpy()[start : self._ends[index]]


def shared_zeros(length: int, dtype: torch.dtype) -> Tensor:
    """Return zeros (length,) in memory that all data workers share.

    Raises:
        RunError: there is no room in /dev/shm.
    """
    try:
        return torch.zeros(length, dtype=dtype).share_memory_()
    except RuntimeError as error:
        raise RunError(f"{error}. {FULL_SHM}") from error


def free_memory() -> int:
    """Return how many more bytes of shared memory this machine has room for."""
    limits = [available_memory()]
    if _SHM.is_dir():
        statistics = os.statvfs(_SHM)
        limits.append(statistics.f_bavail * statistics.f_frsize)
    return min(limits)
