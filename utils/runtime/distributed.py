"""Small distributed API that is safe to call with and without a process group.

The environment variables of torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``) are the only
source of the process layout; a half-set environment is an error, not a guess.
"""

import os
from typing import Any

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group exists in this process."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def get_local_rank() -> int:
    """Rank of this process on its machine (``LOCAL_RANK``), 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_local_world_size() -> int:
    """Number of processes on this machine (``LOCAL_WORLD_SIZE``), 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the files and the log (rank 0)."""
    return get_rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all processes in place and return it."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Return the object that process ``src`` passed (any picklable value; processes of one job trust each other)."""
    if not is_distributed():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def gather_objects(obj: Any) -> list[Any]:
    """Return the objects of all processes, in the order of their ranks, on every process."""
    if not is_distributed():
        return [obj]
    boxes: list[Any] = [None] * get_world_size()
    dist.all_gather_object(boxes, obj)
    return boxes
