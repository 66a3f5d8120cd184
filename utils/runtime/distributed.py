"""A small distributed API that is safe to call with and without a process group.

The environment variables of torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``) are the only
source of the process layout; an environment that is half set is an error, not a guess.
"""

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import RunError

T = TypeVar("T")


def is_distributed() -> bool:
    """Return whether a process group exists in this process."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def get_local_rank() -> int:
    """Return the rank of this process on its machine (``LOCAL_RANK``), 0 without a launcher."""
    return environment_integer("LOCAL_RANK", 0)


def get_local_world_size() -> int:
    """Return the number of processes on this machine (``LOCAL_WORLD_SIZE``), 1 without a launcher."""
    return environment_integer("LOCAL_WORLD_SIZE", 1)


def environment_integer(name: str, default: int) -> int:
    """Return the whole number in an environment variable of the launcher, ``default`` if it is not set.

    Raises:
        RunError: the variable holds something else, or a negative number.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise RunError(
            f"the environment variable {name} is {text!r}, not a whole number; start with torchrun, or unset it"
        )
    return int(text)


def is_main_process() -> bool:
    """Return whether this process writes the shared files (rank 0)."""
    return get_rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all processes in place and return it."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Return the object that process ``src`` passed: any picklable value, as processes of one job trust each other."""
    if not is_distributed():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def gather_objects(obj: Any) -> list[Any]:
    """Return the objects of all processes, ordered by rank, on every process."""
    if not is_distributed():
        return [obj]
    boxes: list[Any] = [None] * get_world_size()
    dist.all_gather_object(boxes, obj)
    return boxes


def on_main_process(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 alone; return its result, or raise its error, on every process. Collective.

    Args:
        action: what to do; its result is sent to all processes.

    Raises:
        OSError, RuntimeError, ValueError: what ``action`` raised, of the same class and with the same message on all
            processes; on the others its attribute ``culprit`` names rank 0 and its host. Another error ends rank 0,
            and the others by the loss of their connection.
    """
    result, error, host = broadcast_object((*attempt(action), socket.gethostname()) if is_main_process() else None)
    if error is not None:
        if not is_main_process():
            error.culprit = f"rank 0 on {host}"
        raise error
    return result


def load_on_main_process(read: Callable[[], Any]) -> Any:
    """Run ``read`` on rank 0 alone; return the tree of tensors and plain values that it returns, on every process.

    Tensors are sent one by one: no process holds more than the tree and one tensor. Collective.

    Args:
        read: returns nested dicts, lists and tuples; tensors are on the CPU.

    Raises:
        OSError, RuntimeError, ValueError: as ``on_main_process`` does.
    """
    tensors: list[Tensor] = []

    def outline() -> Any:
        return _change_tensors(read(), lambda tensor: tensors.append(tensor) or tensor.to("meta"))

    tree, own = on_main_process(outline), iter(tensors)
    main = is_main_process()
    return _change_tensors(tree, lambda spec: _send(next(own) if main else torch.empty(spec.shape, dtype=spec.dtype)))


def _send(tensor: Tensor) -> Tensor:
    """Return rank 0's tensor on every process, bit by bit."""
    if is_distributed() and tensor.numel():
        dist.broadcast(tensor.contiguous().view(-1).view(torch.uint8), src=0)
    return tensor


def _change_tensors(node: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested dicts, lists and tuples with their tensors changed, in their order."""
    if isinstance(node, Tensor):
        return change(node)
    if isinstance(node, dict):
        return type(node)((key, _change_tensors(value, change)) for key, value in node.items())
    if isinstance(node, (list, tuple)):
        return type(node)(_change_tensors(value, change) for value in node)
    return node


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return (result, None), or (None, error) if ``action`` failed in a way that the other processes must hear of."""
    try:
        return action(), None
    except (OSError, RuntimeError, ValueError) as error:
        return None, error
