"""Operations on channels_last maps, arranged for the caches and the kernels of a CPU, or for the kernels of a GPU.

Legend: B batch, C channels, H rows, W columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import autocast_dtype

# Types of device whose caches, kernels and host count as a CPU's; every other type is treated as a GPU.
CPU_TYPES = frozenset({"cpu"})

# Bytes per CPU thread of a map small enough that a few such maps stay in the cache from one operation to the next.
CACHED_BYTES = 1536 * 1024


def on_cpu(x: Tensor) -> bool:
    """Return whether ``x`` is computed with on a CPU, where the host does not run ahead of the device."""
    return x.device.type in CPU_TYPES


def square_kernel(weight: Tensor) -> Tensor:
    """Return depthwise kernels, (C, 1, rows, columns), both odd, filled up with zeros to squares of the larger side."""
    side = max(weight.shape[2:])
    rows, columns = ((side - size) // 2 for size in weight.shape[2:])
    return F.pad(weight, (columns, columns, rows, rows)) if rows or columns else weight


def depthwise_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a depthwise convolution with stride 1: of its input and of its kernels, as ``wanted``.

    Args:
        grad: of the output, (B, C, H', W').
        x: the input, (B, C, H, W).
        weight: the kernels, (C, 1, rows, columns).
        padding: zeros above and below, left and right of the map.
        wanted: which of the two gradients to compute; the other one is None.
    """
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], len(weight), [*wanted, False]
    )[:2]


def channels_last(x: Tensor) -> Tensor:
    """Return ``x``, copied to channels_last memory order if it has another."""
    return x.contiguous(memory_format=torch.channels_last)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type in which a product with ``tensor`` is computed: autocast's where that is on, else its own."""
    return autocast_dtype(tensor.device.type) or tensor.dtype


def gelu(x: Tensor) -> Tensor:
    """Return ``F.gelu(x)`` of a channels_last map through a contiguous view, for which the CPU has a faster kernel."""
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C, H, W) -> (B, H, W, C) -> (B, C, H, W)


def gelu_(x: Tensor) -> Tensor:
    """Apply ``gelu`` in place."""
    torch.ops.aten.gelu_(x.permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, C)
    return x


def cache_groups(x: Tensor) -> tuple[Tensor, ...]:
    """Split the samples into groups: on the CPU so large that a few maps of a group fit its cache, else all in one."""
    if not on_cpu(x) or x.numel() == 0 or torch.compiler.is_compiling():
        return (x,)
    return x.split(max(1, CACHED_BYTES * torch.get_num_threads() // (x[0].numel() * x.element_size())))


def cat_groups(groups: Sequence[Tensor]) -> Tensor:
    """Concatenate the samples of all groups; a single group is returned as it is."""
    return groups[0] if len(groups) == 1 else torch.cat(list(groups))


def norm_over_space(y: Tensor) -> Tensor:
    """Return the L2 norm of each channel, (B, C, H, W) -> (B, C, 1, 1), in float32 at least, without a gradient."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    if on_cpu(y) and y.dtype == dtype:  # 2 to 7 times as fast as the operation for it
        return cat_groups([(part * part).sum(dim=(2, 3), keepdim=True) for part in cache_groups(y)]).sqrt()
    return torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True, dtype=dtype)
