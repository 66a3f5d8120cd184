"""Convolutions with constant weights, which are brought into the form that the device likes once, not in each call.

On a CPU that is the order of oneDNN's kernels. A GELU that follows is applied while a result is still in registers.
This needs PyTorch's operators ``mkldnn._linear_pointwise``, ``mkldnn._convolution_pointwise`` and those that reorder
weights for them, which torch.compile uses too; where oneDNN is missing, or the input is anything but float32, the plain
operations run instead. On a GPU it is the type of autocast, and a square for depthwise kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import autocast_dtype
from .autograd import may_use_handwritten
from .ops import channels_last, gelu_, on_cpu, product_dtype, square_kernel


class _Packed(nn.Module):
    """A weight as a buffer, and the same weight in oneDNN's order."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self._packed: tuple[Any, Any] | None = None  # what it was made for, and the weight in the form that was made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a copy packs its own weight

    def packable(self, x: Tensor) -> bool:
        """Return whether oneDNN can compute with ``x`` and the packed weight."""
        return (
            on_cpu(x)
            and may_use_handwritten()
            and x.dtype == self.weight.dtype == torch.float32
            and autocast_dtype("cpu") is None
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
        )

    def packed(self, pack: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Return ``pack(x)``, made again when the weight or the type of the product has changed."""
        version = 0 if self.weight.is_inference() else self.weight._version
        made_for = (id(self.weight), version, product_dtype(x), pack.__name__)
        if self._packed is None or self._packed[0] != made_for:
            self._packed = (made_for, pack(x))
        return self._packed[1]


class PackedConv2d(_Packed):
    """``F.conv2d(x, weight, padding=padding, groups=groups)`` for inference.

    Args:
        weight: (out, in / groups, kernel rows, kernel columns).
        padding: zeros above and below, left and right of the map.
        groups: groups of channels that do not mix.
    Shape: (B, in, H, W) -> (B, out, H', W'), with H' and W' those of the convolution.
    """

    def __init__(self, weight: Tensor, *, padding: tuple[int, int], groups: int) -> None:
        super().__init__(weight)
        self.padding, self.groups = padding, groups

    def forward(self, x: Tensor) -> Tensor:
        if self.packable(x):
            x, how = channels_last(x), (self.padding, (1, 1), (1, 1), self.groups)
            weight = self.packed(self._ordered, x)
            return torch.ops.mkldnn._convolution_pointwise(x, weight, None, *how, "none", [None], "none")
        if on_cpu(x) or self.weight.shape[1] > 1:
            return F.conv2d(x, self.weight, padding=self.padding, groups=self.groups)
        weight = self._square(x) if torch.compiler.is_compiling() else self.packed(self._square, x)
        return F.conv2d(x, weight, padding=weight.shape[2] // 2, groups=self.groups)

    def _square(self, x: Tensor) -> Tensor:
        return square_kernel(self.weight).to(product_dtype(x))

    def _ordered(self, x: Tensor) -> Tensor:
        how = (self.padding, (1, 1), (1, 1), self.groups, list(x.shape))
        return torch.ops.mkldnn._reorder_convolution_weight(self.weight, *how)


class PackedLinear(_Packed):
    """A linear layer over the channels of a map, followed by a GELU if ``gelu``, for inference.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        gelu: whether to return ``F.gelu`` of the result.
    Shape: (B, in, H, W) -> (B, out, H, W).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> None:
        super().__init__(weight)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] == (1, 1):  # too small for oneDNN to be faster
            x = F.linear(x.flatten(1), *self._constants(x))[:, :, None, None]  # (B, in, 1, 1) -> (B, out, 1, 1)
        elif self.packable(x):
            after = "gelu" if self.gelu else "none"
            x = x.permute(0, 2, 3, 1).contiguous()  # (B, in, H, W) -> (B, H, W, in)
            weight = self.packed(self._ordered, x)
            x = torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, after, [None], "none")
            return x.permute(0, 3, 1, 2)  # (B, H, W, out) -> (B, out, H, W)
        else:
            weight, bias = self._constants(x)
            x = F.conv2d(x, weight[:, :, None, None], bias)
        return gelu_(x) if self.gelu else x

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias, on a GPU in the type of the product."""
        if on_cpu(x) or torch.compiler.is_compiling():
            return self.weight, self.bias
        return self.packed(self._cast, x)

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        dtype = product_dtype(x)
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def _ordered(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight, x.shape[:-1].numel())
