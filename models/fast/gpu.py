"""Layers in the form that suits a GPU's libraries: the same functions, also under ``torch.compile`` and autocast.

cuDNN has fast kernels for depthwise convolutions over channels_last maps, but for square kernels alone, and none for
grouped convolutions with as few channels per group as a Strip MLP layer has. So a depthwise kernel is filled up with
zeros to a square, and a Strip MLP layer becomes one batched matrix product. Small kernels keep the host busy:
autocast's copies of a block's weights are made by one, and its batches counted by one.

Legend as in ``models.blocks``; also R rows of a window, N windows of a map (N * R = H), E rows of a strip.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from ..blocks import ChannelMixingBlock, StripMLPBlock, StripMLPLayer, split_patches
from ..layers import DepthwiseConv2d, autocast_dtype
from .ops import depthwise_gradients, on_cpu, product_dtype, square_kernel

# Positions of a map up to which all its rows are mixed by one matrix; that matrix has this number squared per group.
WHOLE_POSITIONS = 256
# Rows of a window in a larger map: the more, the fewer rows are read twice, and the more of the matrix is zeros.
WINDOW_ROWS = (4, 2, 1)
# Bytes by which the rows of a matrix should be divisible, so that tensor cores read them directly.
ALIGNMENT = 16


class _SquareConvolution(torch.autograd.Function):
    """Depthwise convolution with a square kernel. The input's gradient is one too, with the kernel turned.

    cuDNN's kernel for that gradient takes twice as long as its kernel for the convolution.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        side = weight.shape[2] // 2
        dx = _convolve(grad, weight.flip(2, 3)) if ctx.needs_input_grad[0] else None
        return dx, depthwise_gradients(grad, x, weight, (side, side), (False, True))[1]


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[2] // 2, groups=len(weight))


class SquareDepthwiseConv2d(DepthwiseConv2d):
    """``DepthwiseConv2d`` with a square kernel in compiled code and without gradients, as measured on an H100."""

    def forward(self, x: Tensor) -> Tensor:
        trains, compiles = torch.is_grad_enabled(), torch.compiler.is_compiling()
        if on_cpu(x) or (trains and not compiles):
            return super().forward(x)
        weight = square_kernel(self.weight)
        if not trains:
            return _convolve(x, weight)
        dtype = product_dtype(x)
        return _SquareConvolution.apply(x.to(dtype), weight.to(dtype))


class ProductStripMLPLayer(StripMLPLayer):
    """``StripMLPLayer`` as one matrix product for each of the G groups: (rows of windows, K) x (K, outputs).

    Where a strip reaches beyond the windows next to its own, the convolution stays.

    In compiled code alone: outside it, the many small operations keep the host busy for longer than they save.
    """

    def forward(self, x: Tensor) -> Tensor:
        if on_cpu(x) or not torch.compiler.is_compiling():
            return super().forward(x)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return what ``forward`` returns, as a matrix product."""
        height, width = x.shape[2:] if self.axis == "row" else x.shape[:1:-1]
        windows, rows, padded = _windows(height, width, product_dtype(x).itemsize)
        reach = self.mix.weight.shape[3] // 2 if windows > 1 else 0  # rows that a window sees beyond its own
        if reach > rows:
            return StripMLPLayer.forward(self, x)
        x = split_patches(x, self.num_patches)  # (B, D, H, W) -> (B, H, W, P, G)
        if self.axis == "column":
            x = x.transpose(1, 2)
        batch, patches, groups = len(x), *x.shape[3:]
        x = x.permute(4, 0, 3, 1, 2)  # (B, H, W, P, G) -> (G, B, P, H, W)
        if padded > height:
            x = F.pad(x, (0, 0, 0, padded - height))
        x = x.unflatten(3, (windows, rows))  # (G, B, P, H, W) -> (G, B, P, N, R, W)
        if reach:
            x = _with_neighbours(x, reach)
        x = x.reshape(groups, batch * patches * windows, -1)  # -> (G, B * P * N, (R + 2 * reach) * W)
        x = self.mix_windows(x, rows, reach)
        x = x.view(groups, batch, patches, padded, -1)  # (G, B * P * N, R * W') -> (G, B, P, H, W')
        x = x[:, :, :, :height].permute(1, 3, 4, 2, 0)  # -> (B, H, W', P, G)
        return x.transpose(1, 2) if self.axis == "column" else x

    def mix_windows(self, x: Tensor, rows: int, reach: int) -> Tensor:
        """Mix windows of ``rows`` rows, and ``reach`` more on either side.

        Shape: (G, B * P * N, (R + 2 * reach) * W) -> (G, B * P * N, R * W').
        """
        bias = self.mix.bias.view(len(x), 1, 1, -1)  # (G * W',) -> (G, 1, 1, W')
        bias = bias.expand(-1, -1, rows, -1).reshape(len(x), 1, -1)  # -> (G, 1, R * W')
        return torch.baddbmm(bias, x, strip_matrix(self.mix.weight, len(x), rows, reach))


def _windows(height: int, width: int, element_size: int) -> tuple[int, int, int]:
    """Return the number of windows, the rows of each, and the rows of the map with zeros added below."""
    if height * width <= WHOLE_POSITIONS:
        step = ALIGNMENT // math.gcd(ALIGNMENT, width * element_size)
        padded = math.ceil(height / step) * step
        return 1, padded, padded
    rows = next(rows for rows in WINDOW_ROWS if height % rows == 0)
    return height // rows, rows, height


def _with_neighbours(x: Tensor, reach: int) -> Tensor:
    """Add to each window the last rows of the one above and the first of the one below, zeros at the map's edges.

    Shape: (..., N, R, W) -> (..., N, R + 2 * reach, W).
    """
    above = F.pad(x[..., :-1, -reach:, :], (0, 0, 0, 0, 1, 0))
    below = F.pad(x[..., 1:, :reach, :], (0, 0, 0, 0, 0, 1))
    return torch.cat([above, x, below], dim=-2)


def strip_matrix(weight: Tensor, groups: int, rows: int, reach: int) -> Tensor:
    """Return the matrices that mix a window, (G, (R + 2 * reach) * W, R * W'), most of their blocks zero.

    The block of input row i and output row o holds the weights of strip row i - o + E // 2 - reach, if there is one.
    """
    strip = weight.shape[3]
    moved = strip // 2 - reach  # 0, or strip // 2 for a window that sees no other rows
    size = rows + 2 * reach
    ones = torch.eye(size + moved, rows + strip - 1, dtype=weight.dtype, device=weight.device)[moved:]
    chosen = ones.unfold(1, strip, 1)  # -> (R + 2 * reach, R, E), a one where the block (i, o) is strip row e
    blocks = weight.view(groups, -1, weight.shape[1], strip).permute(3, 0, 2, 1)  # (G * W', W, 1, E) -> (E, G, W, W')
    matrix = chosen.flatten(0, 1) @ blocks.flatten(1)  # -> ((R + 2 * reach) * R, G * W * W')
    matrix = matrix.unflatten(1, blocks.shape[1:]).unflatten(0, (size, rows))  # -> (R + 2 * reach, R, G, W, W')
    return matrix.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


class _Cast(torch.autograd.Function):
    """Copies of tensors in another type, made by one kernel, as are the gradients on their way back."""

    @staticmethod
    def forward(ctx: FunctionCtx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        copies = _copies(tensors, [torch.empty_like(x, dtype=dtype) for x in tensors])
        ctx.mark_non_differentiable(
            *(x for x, trained in zip(copies, ctx.needs_input_grad[1:], strict=True) if not trained)
        )
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_copies(grads, [torch.empty_like(x) for x in ctx.saved_tensors])


def _copies(tensors: Sequence[Tensor], into: list[Tensor]) -> list[Tensor]:
    if torch.compiler.is_compiling():  # PyTorch 2.11 loses what a compiled backward pass writes in place
        return torch.ops.aten._foreach_copy(into, list(tensors))
    torch._foreach_copy_(into, list(tensors))
    return into


# Where a module keeps a tensor: the dictionary of its parameters or buffers, and the name there.
_Place = tuple[dict[str, Tensor | None], str]


def _put(places: Sequence[_Place], tensors: Sequence[Tensor | None]) -> None:
    for (kept, name), tensor in zip(places, tensors, strict=True):
        kept[name] = tensor


class CastingStripMLPBlock(StripMLPBlock):
    """``StripMLPBlock`` that casts its weights and counts its batches by one kernel each, compiled or not.

    Autocast copies each weight by itself, and each BatchNorm counts by itself, which keeps the host busy. During the
    forward pass, the copies are in the places of the weights, and the counters are away; so two threads must not run
    one network at the same time.
    """

    def forward(self, x: Tensor) -> Tensor:
        if on_cpu(x):
            return super().forward(x)
        dtype, counters = autocast_dtype(x.device.type), self._counters()
        weights = [] if dtype is None else self._weights_to_cast()
        parameters, counts = ([kept[name] for kept, name in places] for places in (weights, counters))
        copies = _Cast.apply(dtype, *parameters) if weights else ()
        if counters:
            torch._foreach_add_(counts, 1)
        try:
            _put(weights + counters, [*copies, *[None] * len(counters)])
            return super().forward(x)
        finally:
            _put(weights + counters, parameters + counts)

    def _weights_to_cast(self) -> list[_Place]:
        chained = type(self.channel_mixing) is not ChannelMixingBlock  # reads its LayerNorm again in the backward pass
        kinds = (nn.Conv2d, nn.Linear) if chained else (nn.Conv2d, nn.Linear, nn.LayerNorm)
        layers = [layer._parameters for layer in self.modules() if isinstance(layer, kinds)]
        return [(kept, name) for kept in layers for name, x in kept.items() if x is not None]

    def _counters(self) -> list[_Place]:
        mixing = self.strip_mixing
        norms = (mixing.norm1, mixing.norm2, getattr(mixing.cgsmm, "norm", None))
        norms = [norm for norm in norms if type(norm) is nn.BatchNorm2d and norm.training and norm.momentum is not None]
        return [(norm._buffers, "num_batches_tracked") for norm in norms if norm.num_batches_tracked is not None]
