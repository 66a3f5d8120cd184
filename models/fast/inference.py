"""The network for inference alone: the same function with everything folded that is constant once training is over.

What is folded, in the order of a block:

- the first BatchNorm becomes one scale and shift; the one after the projection goes into its weight and bias;
- a Strip MLP layer is linear, so ``mix(u + pos) = mix_without_bias(u) + mix(pos)``: the position table and the bias
  become one constant map, which is sent through the 1x1 convolutions after the layer and added once, at their end;
- the CGSMM's last convolution and the block's fuse are linear in [u, columns] and become one matrix product over
  [u, columns, v'];
- LayerNorm's scale and shift go into the linear layer after it, GRN's shift into the bias of the next one;
- the last BatchNorm goes into the head, with which it commutes over the mean.

Weights are folded in float64. Legend as in ``models.blocks``.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import (
    CGSMM,
    LSMM,
    ChannelMixingBlock,
    StripMixingBlock,
    StripMLPBlock,
    StripMLPLayer,
    cat_channels,
    split_patches,
)
from ..layers import autocast_off, mean_over_space
from .autograd import grn_scale
from .gpu import ProductStripMLPLayer, strip_matrix
from .ops import channels_last, gelu_, norm_over_space, on_cpu, product_dtype
from .packed import PackedConv2d, PackedLinear

# Bytes per CPU thread of the largest map of a group of samples that goes through a stage together: what one operation
# writes, the next finds in the cache.
GROUP_BYTES = 6 * 2**20


class InferenceStripMLP(nn.Module):
    """A trained ``StripMLPNet`` in its inference form; made by ``StripMLPNet.to_inference()``.

    It takes what the network takes and returns what the network returns in evaluation mode. Its tensors are buffers
    with names of their own: it can be moved and saved, but not trained or differentiated, and it keeps the weights that
    the network had when it was made.

    Args:
        model: the network, a ``StripMLPNet``; it is left alone.
    Shape: (B, in_chans, *img_size) -> (B, num_classes).
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.img_size, self.in_chans, self.num_classes = model.img_size, model.in_chans, model.num_classes
        self.global_pool = model.global_pool
        self.patch_embed = _frozen(model.patch_embed)
        self.stages = nn.ModuleList(nn.ModuleList(map(_folded_block, stage)) for stage in model.stages)
        self.merging = nn.ModuleList(_frozen(layer) for layer in model.merging)
        self.skip_1_to_3, self.skip_1_to_4 = _frozen(model.skip_1_to_3), _frozen(model.skip_1_to_4)
        self.skip_2_to_4 = _frozen(model.skip_2_to_4)
        self._fold_head(model.norm, model.head)
        self.requires_grad_(False)
        super().train(False)

    def _fold_head(self, norm: nn.BatchNorm2d, head: nn.Module) -> None:
        scale, shift = _affine(norm)
        if isinstance(head, nn.Linear):
            weight = head.weight.double()
            _store(self, norm.weight, head_weight=weight * scale, head_bias=head.bias.double() + weight @ shift)
        else:  # no head: the normalised mean itself
            _store(self, norm.weight, head_weight=scale.diag(), head_bias=shift)

    def train(self, mode: bool = True) -> "InferenceStripMLP":
        """Refuse to train.

        Raises:
            RuntimeError: if ``mode`` is true.
        """
        if mode:
            raise RuntimeError(
                "the inference form cannot be trained: train the network it was made from, then call "
                "to_inference() again"
            )
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the images."""
        if x.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"input of shape {tuple(x.shape)}, but this network takes (batch, {self.in_chans}, "
                f"{self.img_size[0]}, {self.img_size[1]})"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("the inference form gives no gradients: use the network it was made from")
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        merged1 = self.merging[0](self._stage(0, x))
        merged2 = self.merging[1](self._stage(1, merged1))
        skip = self.skip_1_to_3(merged1)
        stage3 = self._stage(2, merged2 + skip)
        x = self._stage(3, self.merging[2](stage3) + self.skip_1_to_4(skip) + self.skip_2_to_4(merged2))
        if not self.global_pool:  # each position is scored
            return F.conv2d(x, self.head_weight[:, :, None, None], self.head_bias)
        return F.linear(x.mean(dim=(2, 3)), self.head_weight, self.head_bias)

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Run the blocks of one stage over groups of samples that fit the cache. Shape: (B, C, H, W) -> same."""
        blocks = self.stages[stage]
        if not on_cpu(x) or torch.compiler.is_compiling() or len(blocks) == 0:
            return _run(blocks, x)
        largest = len(blocks[0].fc1.weight) * x.shape[2] * x.shape[3] * x.element_size()
        group = max(1, round(GROUP_BYTES * torch.get_num_threads() / largest))
        return _run(blocks, x) if len(x) <= group else torch.cat([_run(blocks, part) for part in x.split(group)])


def _run(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _folded_block(block: StripMLPBlock) -> nn.Module:
    whole = isinstance(block.strip_mixing.cgsmm, CGSMM)
    return _FoldedBlock(block) if whole else _FoldedBlockWithoutCGSMM(block)


class _FoldedBlock(nn.Module):
    """Inference form of a ``StripMLPBlock``. Shape: (B, C, H, W) -> same."""

    def __init__(self, block: StripMLPBlock) -> None:
        super().__init__()
        self._fold_strip_mixing(block.strip_mixing)
        self._fold_channel_mixing(block.channel_mixing)

    def _fold_strip_mixing(self, mixing: StripMixingBlock) -> None:
        like = mixing.project.weight
        scale, shift = _affine(mixing.norm1)
        _store(self, like, norm_scale=scale.view(1, -1, 1, 1), norm_shift=shift.view(1, -1, 1, 1))
        self.dwconv = _conv(mixing.dwconv)
        self.lsmm = _FoldedLSMM(mixing.lsmm) if isinstance(mixing.lsmm, LSMM) else _frozen(mixing.lsmm)
        scale, shift = _affine(mixing.norm2)
        weight, bias = _matrix(mixing.project.weight), mixing.project.bias.double()
        self.project = _linear(like, scale[:, None] * weight, scale * bias + shift, gelu=True)
        self._fold_cgsmm(mixing.cgsmm, _matrix(mixing.fuse.weight))

    def _fold_cgsmm(self, cgsmm: CGSMM, fuse: Tensor) -> None:
        dim = cgsmm.row_fuse.out_channels
        self.row_mix, rows = _without_bias(cgsmm.row_mix, cgsmm.row_position.position_map())
        self.column_mix, columns = _without_bias(cgsmm.column_mix, cgsmm.column_position.position_map())
        scale, shift = _affine(cgsmm.norm)
        weight = scale[:, None] * _matrix(cgsmm.row_fuse.weight)  # over [rows, u]
        row_map = torch.einsum("oi,ihw->ohw", weight[:, :dim], rows) + shift[:, None, None]
        last = _matrix(cgsmm.column_fuse.weight)  # over [u, columns]
        into_u = fuse[:, :dim] @ last  # over [u, columns], for all C outputs
        fuse_map = torch.einsum("oi,ihw->ohw", into_u[:, dim:], columns)
        like = cgsmm.row_fuse.weight
        self.row_fuse = _linear(like, weight)
        self.fuse = _linear(like, torch.cat([into_u, fuse[:, dim:]], dim=1))
        _store(self, like, row_map=_map(row_map), fuse_map=_map(fuse_map))

    def _fold_channel_mixing(self, mixing: ChannelMixingBlock) -> None:
        self.dwconv7 = _conv(mixing.dwconv)
        self.eps = mixing.norm.eps
        self.grn = _frozen(mixing.grn)
        first, second = mixing.fc1.weight.double(), mixing.fc2.weight.double()
        scale, shift = mixing.norm.weight.double(), mixing.norm.bias.double()
        fc1_bias = mixing.fc1.bias.double() + first @ shift
        fc2_bias = mixing.fc2.bias.double() + second @ mixing.grn.beta.double().flatten()
        self.fc1 = _linear(mixing.fc1.weight, first * scale, fc1_bias, gelu=True)
        self.fc2 = _linear(mixing.fc2.weight, second, fc2_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self._with_strip_mixing(x)
        return self._with_channel_mixing(x)

    def _with_strip_mixing(self, residual: Tensor) -> Tensor:
        x = gelu_(torch.addcmul(self.norm_shift.to(residual.dtype), residual, self.norm_scale.to(residual.dtype)))
        x = self.project(self.dwconv(x))
        u, v = x.chunk(2, dim=1)  # (B, C, H, W) -> 2 x (B, D, H, W)
        return self._fused(u, self.lsmm(channels_last(v))).add_(residual)

    def _fused(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the CGSMM of ``u`` and the LSMM's output ``v`` fused, 2 x (B, D, H, W) -> (B, C, H, W)."""
        u_patches, v_patches = (split_patches(x, self.row_mix.num_patches) for x in (u, v))  # -> (B, H, W, P, G)
        q = gelu_(self.row_fuse(cat_channels(self.row_mix(u), u_patches)).add_(self.row_map))
        return self.fuse(cat_channels(u_patches, self.column_mix(q), v_patches)).add_(self.fuse_map)

    def _with_channel_mixing(self, residual: Tensor) -> Tensor:
        x = self.dwconv7(residual).permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        with autocast_off(x.device.type):  # which would make a float32 map of it
            x = F.layer_norm(x, x.shape[3:], None, None, self.eps)
        x = self.fc1(x.permute(0, 3, 1, 2))  # (B, H, W, C) -> (B, C, H, W)
        scale = grn_scale(norm_over_space(x), self.grn.gamma, self.grn.eps, x.dtype)
        return self.fc2(x.mul_(scale)).add_(residual)


class _FoldedBlockWithoutCGSMM(_FoldedBlock):
    """Inference form of a block whose LSMM works alone."""

    def _fold_cgsmm(self, cgsmm: nn.Module, fuse: Tensor) -> None:
        self.fuse = _linear(self.norm_scale, fuse)

    def _fused(self, u: Tensor, v: Tensor) -> Tensor:
        return self.fuse(torch.cat([u, v], dim=1))


class _FoldedStripLayer(ProductStripMLPLayer):
    """Inference form of a ``StripMLPLayer``, without its bias; the matrices of its product are made once."""

    def forward(self, x: Tensor) -> Tensor:
        return StripMLPLayer.forward(self, x) if on_cpu(x) else self.product(x)

    def mix_windows(self, x: Tensor, rows: int, reach: int) -> Tensor:
        def matrix(x: Tensor) -> Tensor:
            return strip_matrix(self.mix.weight, len(x), rows, reach).to(product_dtype(x))

        return torch.bmm(x, matrix(x) if torch.compiler.is_compiling() else self.mix.packed(matrix, x))


class _FoldedLSMM(nn.Module):
    """Inference form of an ``LSMM``. Shape: (B, D, H, W) -> same."""

    def __init__(self, lsmm: LSMM) -> None:
        super().__init__()
        self.tall, self.wide = _conv(lsmm.tall), _conv(lsmm.wide)
        first, second = lsmm.reweight1, lsmm.reweight2
        self.reweight1 = _linear(first.weight, _matrix(first.weight), first.bias, gelu=True)
        self.reweight2 = _linear(second.weight, _matrix(second.weight), second.bias)

    def forward(self, v: Tensor) -> Tensor:
        tall, wide = self.tall(v), self.wide(v)
        z = self.reweight2(self.reweight1(mean_over_space(tall) + mean_over_space(wide) + mean_over_space(v)))
        weights = z.unflatten(1, (-1, 3)).softmax(dim=2).to(v.dtype)  # (B, 3 * D, 1, 1) -> (B, D, 3, 1, 1)
        return tall.mul_(weights[:, :, 0]).addcmul_(wide, weights[:, :, 1]).addcmul_(v, weights[:, :, 2])


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the scale and shift, float64 (C,), that the BatchNorm applies in evaluation mode."""
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - scale * norm.running_mean.double()


def _matrix(kernel: Tensor) -> Tensor:
    """Return the weight of a 1x1 convolution as a float64 matrix (out, in)."""
    return kernel.double().flatten(1)


def _conv(conv: nn.Conv2d) -> PackedConv2d:
    """Return the convolution, which has no bias, with a constant copy of its weight."""
    return PackedConv2d(conv.weight.detach().clone(), padding=conv.padding, groups=conv.groups)


def _linear(like: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> PackedLinear:
    """Return a linear layer with a copy of the (out, in) weight, in the type and on the device of ``like``."""
    weight, bias = (None if tensor is None else tensor.detach().clone().to(like) for tensor in (weight, bias))
    return PackedLinear(weight, bias, gelu=gelu)


def _map(values: Tensor) -> Tensor:
    """Return the map with a batch axis, in channels_last order, (D, H, W) -> (1, D, H, W)."""
    return values[None].contiguous(memory_format=torch.channels_last)


def _store(module: nn.Module, like: Tensor, **tensors: Tensor) -> None:
    """Register ``tensors`` as buffers of ``module``, with the type and device of ``like``."""
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor.detach().to(like))


def _frozen(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` in evaluation mode whose parameters take no gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def _without_bias(layer: StripMLPLayer, position: Tensor) -> tuple[StripMLPLayer, Tensor]:
    """Return ``layer`` without its bias, and its output for the position map with its bias, float64 (D, H, W)."""
    constant = copy.deepcopy(layer).double()(position.double()[None])  # (1, D, H, W) -> (1, H, W, P, G)
    linear = _frozen(layer)
    linear.__class__, linear.mix = _FoldedStripLayer, _conv(layer.mix)
    return linear, constant[0].flatten(2).permute(2, 0, 1)  # (H, W, P, G) -> (H, W, D) -> (D, H, W)
