"""Convolutions with constant weights, which oneDNN keeps in its own order on the CPU.

An ordinary convolution copies its weight into the order of oneDNN's kernels in every call; constant weights are copied
once. A GELU that follows is applied while a result is still in registers. This needs PyTorch's operators
``mkldnn._linear_pointwise``, ``mkldnn._convolution_pointwise`` and those that reorder weights for them, which
torch.compile uses too; where oneDNN is missing, or the input is anything but float32 on the CPU, the plain operations
run instead.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import autocast_dtype
from .autograd import may_use_handwritten
from .ops import channels_last, gelu_


class _Packed(nn.Module):
    """A weight as a buffer, and the same weight in oneDNN's order."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self._packed: tuple[Tensor, int, Tensor] | None = None  # weight, its version, the same in oneDNN's order

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a copy packs its own weight

    def packable(self, x: Tensor) -> bool:
        """Return whether oneDNN can compute with ``x`` and the packed weight."""
        return (
            may_use_handwritten(x)
            and x.dtype == self.weight.dtype == torch.float32
            and autocast_dtype("cpu") is None
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
        )

    def packed(self, x: Tensor) -> Tensor:
        """Return the weight in the order that suits maps like ``x``, packed again if the weight has changed."""
        version = 0 if self.weight.is_inference() else self.weight._version
        if self._packed is None or self._packed[0] is not self.weight or self._packed[1] != version:
            self._packed = (self.weight, version, self.pack(x))
        return self._packed[2]

    def pack(self, x: Tensor) -> Tensor:
        """Return the weight in oneDNN's order."""
        raise NotImplementedError


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
        if not self.packable(x):
            return F.conv2d(x, self.weight, padding=self.padding, groups=self.groups)
        x, how = channels_last(x), (self.padding, (1, 1), (1, 1), self.groups)
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed(x), None, *how, "none", [None], "none")

    def pack(self, x: Tensor) -> Tensor:
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
            x = F.linear(x.flatten(1), self.weight, self.bias)[:, :, None, None]  # (B, in, 1, 1) -> (B, out, 1, 1)
        elif self.packable(x):
            after = "gelu" if self.gelu else "none"
            x = x.permute(0, 2, 3, 1).contiguous()  # (B, in, H, W) -> (B, H, W, in)
            x = torch.ops.mkldnn._linear_pointwise(x, self.packed(x), self.bias, after, [None], "none")
            return x.permute(0, 3, 1, 2)  # (B, H, W, out) -> (B, out, H, W)
        else:
            x = F.conv2d(x, self.weight[:, :, None, None], self.bias)
        return gelu_(x) if self.gelu else x

    def pack(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight, x.shape[:-1].numel())
