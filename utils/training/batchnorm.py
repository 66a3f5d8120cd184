"""BatchNorm's running statistics: found, backed up, averaged over the processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from utils.runtime import all_reduce_sum, get_world_size


def batchnorm_buffers(model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Return the running statistics of all BatchNorm layers of ``model``, by their state-dict names.

    ``trained_only`` leaves out those of frozen layers, which do not move.
    """
    buffers = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if trained_only and module.weight is not None and not module.weight.requires_grad:
                continue
            for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
                buffers[name] = buffer
    return buffers


class BufferBackup:
    """A copy of some tensors that can be put back under a condition that only the device knows."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._groups: list[list[Tensor]] = []
        for dtype in {t.dtype: None for t in tensors}:
            self._groups.append([t for t in tensors if t.dtype == dtype])
        self._saved: list[Tensor] = []

    @staticmethod
    def _flat(group: list[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1) for t in group])

    @torch.no_grad()
    def save(self) -> None:
        """Copy the present values."""
        self._saved = [self._flat(group) for group in self._groups]

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Put the saved values back if ``condition``, one boolean on the device, holds."""
        for group, saved in zip(self._groups, self._saved, strict=True):
            values = torch.where(condition, saved, self._flat(group))
            parts = [v.view_as(t) for v, t in zip(values.split([t.numel() for t in group]), group, strict=True)]
            torch._foreach_copy_(group, parts)


def average_buffers(buffers: list[Tensor]) -> None:
    """Replace floating-point ``buffers`` by their mean over the processes, in one flat all-reduce. Collective.

    Every process must pass tensors of the same shapes in the same order. Integer buffers (``num_batches_tracked``) are
    equal on all processes already and are left alone.
    """
    floating = [b for b in buffers if b.is_floating_point()]
    if get_world_size() == 1 or not floating:
        return
    flat = torch.cat([b.detach().reshape(-1) for b in floating])
    all_reduce_sum(flat).div_(get_world_size())
    for buffer, mean in zip(floating, flat.split([b.numel() for b in floating]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@contextmanager
def averaged_batchnorm(*models: nn.Module | None) -> Iterator[None]:
    """Average BatchNorm's running statistics over the processes inside the block; put each process's own back after it.

    Those of frozen layers are equal on all processes and are left as they are, to the bit.
    Evaluation and saving thus see one model whatever the number of processes, and never influence the training.
    Collective: every process enters with the same models.
    """
    buffers = [b for m in models if m is not None for b in batchnorm_buffers(m, trained_only=True).values()]
    local = [b.clone() for b in buffers] if get_world_size() > 1 else []
    average_buffers(buffers)
    try:
        yield
    finally:
        if local:
            torch._foreach_copy_(buffers, local)
