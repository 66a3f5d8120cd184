"""The blocks with hand-written gradients, and what attaches them to a network.

Each class computes what its base in ``models.blocks`` or ``models.layers`` computes and has the same parameters and
buffers, so that ``accelerate`` only changes the class of a module, as PyTorch's parametrizations do. Legend as in
``models.blocks``.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..blocks import (
    CGSMM,
    LSMM,
    ChannelMixingBlock,
    RelativePosition,
    StripMixingBlock,
    StripMLPBlock,
    cat_channels,
    split_patches,
)
from ..layers import GRN, ChannelLayerNorm, DepthwiseConv2d, PointwiseLinear, add_residual
from .autograd import add_position, gelu_grn, grn, is_plain, may_use_handwritten, norm_gelu, weighted_sum
from .depthwise import depthwise_conv
from .gpu import CastingStripMLPBlock, ProductStripMLPLayer, SquareDepthwiseConv2d
from .linear_chain import ChainLink, linear_chain
from .ops import on_cpu

Model = TypeVar("Model", bound=nn.Module)


class FastDepthwiseConv2d(DepthwiseConv2d):
    """``DepthwiseConv2d`` with a faster weight gradient for wide kernels."""

    def forward(self, x: Tensor) -> Tensor:
        wide = self.kernel_size[1] > 3 and x.shape[3] > 1
        if wide and on_cpu(x) and may_use_handwritten() and torch.is_grad_enabled() and self.weight.requires_grad:
            return depthwise_conv(x, self.weight)
        return super().forward(x)


class FastCGSMM(CGSMM):
    """``CGSMM`` that keeps less for the backward pass."""

    def forward(self, u: Tensor) -> Tensor:
        if not may_use_handwritten():
            return super().forward(u)
        patches = split_patches(u, self.row_mix.num_patches)  # (B, D, H, W) -> (B, H, W, P, G)
        rows = self.row_mix(self.row_position(u))
        q = norm_gelu(self.norm, self.row_fuse(cat_channels(rows, patches)))
        columns = self.column_mix(self.column_position(q))
        return self.column_fuse(cat_channels(patches, columns))


class FastLSMM(LSMM):
    """``LSMM`` that keeps less for the backward pass."""

    def forward(self, v: Tensor) -> Tensor:
        layers = self.reweight1, self.reweight2
        trains = torch.is_grad_enabled() and v.requires_grad
        if not (trains and may_use_handwritten() and all(is_plain(layer, nn.Conv2d) for layer in layers)):
            return super().forward(v)
        return weighted_sum(self.tall(v), self.wide(v), v, weigh=self.weights, modules=layers)


class FastStripMixingBlock(StripMixingBlock):
    """``StripMixingBlock`` that keeps less for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not may_use_handwritten():
            return super().forward(x)
        x = self.project(self.dwconv(norm_gelu(self.norm1, x)))
        u, v = norm_gelu(self.norm2, x, halves=True)  # (B, C, H, W) -> 2 x (B, D, H, W)
        return self.fuse(torch.cat([self.cgsmm(u), self.lsmm(v)], dim=1))


class FastChannelMixingBlock(ChannelMixingBlock):
    """``ChannelMixingBlock`` over groups of samples that fit the cache, which keeps less for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        kinds = {self.norm: ChannelLayerNorm, self.fc1: PointwiseLinear, self.grn: GRN, self.fc2: PointwiseLinear}
        if not may_use_handwritten() or not all(is_plain(module, kind) for module, kind in kinds.items()):
            return super().forward(x)
        expand = ChainLink(self.fc1, self.norm, [self.norm])
        reduce = ChainLink(self.fc2, partial(gelu_grn, self.grn), [self.grn], shift=self.grn.beta.flatten())
        return linear_chain(self.dwconv(x), [expand, reduce])  # (B, C, H, W) -> (B, K, H, W) -> (B, C, H, W)


class FastGRN(GRN):
    """``GRN`` whose gradient goes through the map less often."""

    def forward(self, y: Tensor) -> Tensor:
        if on_cpu(y) or not may_use_handwritten() or not torch.is_grad_enabled():
            return super().forward(y)
        return grn(self, y)


class FastRelativePosition(RelativePosition):
    """``RelativePosition`` with fewer operations, for a device whose host launches each of them."""

    def forward(self, x: Tensor) -> Tensor:
        if on_cpu(x) or not may_use_handwritten() or not torch.is_grad_enabled():
            return super().forward(x)
        return add_position(self, x)


class FastStripMLPBlock(StripMLPBlock):
    """``StripMLPBlock`` in which samples that DropPath drops skip the channel mixing."""

    def forward(self, x: Tensor) -> Tensor:
        if not (on_cpu(x) and may_use_handwritten()):  # on a GPU, the host would have to wait for the draw
            return super().forward(x)
        x = add_residual(x, self.strip_mixing(x), self.drop_path)
        return add_residual_of_kept(x, self.channel_mixing, self.drop_path)


def add_residual_of_kept(x: Tensor, branch: Callable[[Tensor], Tensor], drop_path: DropPath) -> Tensor:
    """Return ``add_residual(x, branch(x), drop_path)``, with only those samples in ``branch`` that are not dropped.

    The branch must treat each sample alone. Its batch depends on the draw.
    """
    if not drop_path.training or drop_path.drop_prob == 0.0:
        return x + branch(x)
    mask = drop_path(x.new_ones(len(x), 1, 1, 1))
    kept = mask.flatten().nonzero().squeeze(1)
    if len(kept) in (0, len(x)):
        return torch.addcmul(x, branch(x), mask)
    rows = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C), so that samples are contiguous
    out = branch(rows.index_select(0, kept).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    scale = 1.0 / (1.0 - drop_path.drop_prob) if drop_path.scale_by_keep else 1.0
    return rows.index_add(0, kept, out.to(x.dtype), alpha=scale).permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


_LEAN = (FastCGSMM, FastLSMM, FastStripMixingBlock, FastChannelMixingBlock)
_CPU = (FastDepthwiseConv2d, FastStripMLPBlock)
_GPU = (SquareDepthwiseConv2d, ProductStripMLPLayer, CastingStripMLPBlock, FastRelativePosition)


def accelerate(model: Model, device_type: str = "cpu", *, lean: bool = True) -> Model:
    """Give the blocks of a network their faster forms for a type of device, in place, and return the network.

    Values and gradients are those of the plain formulation up to rounding. Parameters, buffers, their names and the
    configuration stay; only modules of exactly the classes in ``models`` change. The hand-written gradients step aside
    for ``torch.compile``, exports, and modules that were replaced or carry hooks. They cannot be differentiated twice.

    Args:
        model: a ``StripMLPNet``, or any module; what has no fast form is left alone.
        device_type: ``"cpu"`` or ``"cuda"``; a network that is moved later runs on the other one too, but slower.
        lean: compute gradients by hand wherever less is kept; without it, on a GPU, only where that takes fewer
            operations: those of GRN, LSMM and the position tables.
    """
    if device_type == "cuda":
        chosen = (*_GPU, *_LEAN) if lean else (*_GPU, FastGRN, FastLSMM)
    else:
        chosen = (*_CPU, *_LEAN) if lean else ()
    forms = {form.__base__: form for form in chosen}
    for module in model.modules():
        if type(module) in forms:
            module.__class__ = forms[type(module)]
    return model
