"""Depthwise convolution with a weight gradient that suits the CPU's kernels."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from .ops import channels_last, depthwise_gradients, product_dtype


class _DepthwiseConv(torch.autograd.Function):
    """Depthwise convolution whose weight gradient is computed separately for the middle of the kernel and its sides.

    oneDNN is several times faster for kernels at most 3 wide. Column j of the gradient pairs dL/dy with the input moved
    by j - width // 2. For the three middle columns the padding of a 3 wide kernel does that. For the columns lo ..
    hi - 1 of a side it is a narrow kernel over the input with width // 2 - lo zeros put to its left and
    hi - 1 - width // 2 to its right, where a negative number cuts columns off.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, width = weight.shape[2] // 2, weight.shape[3]
        middle = width // 2
        grad, dweight = channels_last(grad), torch.empty_like(weight)

        def columns(lo: int, hi: int, x: Tensor, padding: int) -> None:
            dweight[..., lo:hi] = depthwise_gradients(grad, x, weight[..., lo:hi], (rows, padding), (False, True))[1]

        columns(middle - 1, middle + 2, x, 1)
        for lo, hi in ((0, middle - 1), (middle + 2, width)):
            columns(lo, hi, F.pad(x, (middle - lo, hi - 1 - middle)), 0)
        return depthwise_gradients(grad, x, weight, (rows, middle), (True, False))[0], dweight


def depthwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Return the depthwise convolution with stride 1 and zero padding, (B, C, H, W) -> same.

    Args:
        x: map with more than one column.
        weight: (C, 1, rows, columns), both odd, more than 3 columns.
    """
    dtype = product_dtype(x)
    return _DepthwiseConv.apply(x.to(dtype), weight.to(dtype))
