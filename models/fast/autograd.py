"""Hand-written gradients, which take less memory and time than those that autograd derives.

Autograd keeps every intermediate map for the backward pass and walks through memory once for each small operation. The
functions here and in ``linear_chain`` keep the inputs of a group of cheap operations and rebuild the rest in the
backward pass. Values and gradients are those of the formula that each docstring states; they cannot be differentiated
twice. ``blocks`` decides where they are used, with ``may_use_handwritten`` and ``is_plain``.

Legend: B batch, C or K channels, H rows, W columns.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from ..blocks import RelativePosition
from ..layers import GRN, autocast_off
from .ops import cache_groups, channels_last, gelu, gelu_, norm_over_space, on_cpu

aten = torch.ops.aten

# Types of device on which this was measured to be faster. On a GPU it takes less memory, but no less time.
DEVICES = frozenset({"cpu"})


def may_use_handwritten() -> bool:
    """Return whether no compiler or export is tracing, which rearrange the operations themselves."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether reading the parameters of ``module`` is as good as calling it: exactly a ``kind``, no hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


def autocast_as_before(ctx: FunctionCtx) -> AbstractContextManager[None]:
    """Return the autocast of the forward pass, which ``ctx`` holds as ``device`` and ``autocast``."""
    return torch.autocast(ctx.device, ctx.autocast, enabled=ctx.autocast is not None, cache_enabled=False)


def _gelu_backward(grad: Tensor, x: Tensor, *, out: Tensor) -> None:
    """Write ``grad * GELU'(x)`` into ``out``, which may be ``x``; all are channels_last, seen as contiguous."""
    grad, x, out = (t.permute(0, 2, 3, 1) for t in (grad.to(x.dtype), x, out))  # (B, C, H, W) -> (B, H, W, C)
    aten.gelu_backward.grad_input(grad, x, grad_input=out)


class _NormGelu(torch.autograd.Function):
    """y = GELU(n(x)) with n the BatchNorm of the batch; keeps x and the statistics, and rebuilds n(x) from them.

    dL/dx is the BatchNorm's gradient at dL/dn = dL/dy * GELU'(n(x)), both by PyTorch's own kernels.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, norm: nn.BatchNorm2d, halves: bool, weight: Tensor, bias: Tensor) -> Any:
        normalised, mean, invstd = torch.native_batch_norm(
            x, weight, bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.eps = norm.eps
        if halves:
            return tuple(channels_last(half) for half in gelu_(normalised).chunk(2, dim=1))
        return gelu_(normalised)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd = ctx.saved_tensors
        variance = invstd.pow(-2) - ctx.eps
        grad = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, ctx.eps)[0]  # n(x), soon dL/dn
        _gelu_backward(channels_last(grads[0] if len(grads) == 1 else torch.cat(grads, dim=1)), grad, out=grad)
        dx, dweight, dbias = aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, invstd, True, ctx.eps, [True, True, True]
        )
        return dx, None, None, dweight, dbias


def norm_gelu(norm: nn.Module, x: Tensor, *, halves: bool = False) -> Any:
    """Return ``F.gelu(norm(x))``; with ``halves``, the two halves of its channels as maps of their own.

    Shape: (B, C, H, W) -> same, or two of (B, C / 2, H, W).
    """
    trains = torch.is_grad_enabled() and x.requires_grad and norm.training
    if not (trains and is_plain(norm, nn.BatchNorm2d) and norm.momentum is not None):
        x = norm(x)
        return tuple(F.gelu(half) for half in x.chunk(2, dim=1)) if halves else gelu(x)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return _NormGelu.apply(x, norm, halves, norm.weight, norm.bias)


class _GeluGRN(torch.autograd.Function):
    """z = a * s with a = GELU(h), s = 1 + gamma * n, n = g / m, g the norm of a over space, m the mean of g, plus eps.

    With the sums r = sum over space of dL/dz * a, one per sample and channel, and q = gamma * r:
    dL/dgamma = sum over samples of r * n,  dL/dg = (q - mean over channels of q * n) / m,
    dL/dh = GELU'(h) * (s * dL/dz + a / g * dL/dg), where a channel with g = 0 contributes nothing through g.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor, gamma: Tensor, eps: float) -> Tensor:
        z, activated, norms = torch.empty_like(h), [], []
        for h_i, z_i in zip(cache_groups(h), cache_groups(z), strict=True):
            activated.append(gelu(h_i))
            norms.append(norm_over_space(activated[-1]))
            torch.mul(activated[-1], grn_scale(norms[-1], gamma, eps, h.dtype), out=z_i)
        ctx.save_for_backward(h, gamma, torch.cat(norms), *activated)
        ctx.eps = eps
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dz: Tensor) -> tuple[Tensor | None, ...]:
        h, gamma, norm, *activated = ctx.saved_tensors
        mean = norm.mean(dim=1, keepdim=True) + ctx.eps
        response, scale = norm / mean, grn_scale(norm, gamma, ctx.eps, h.dtype)
        dh, sums = torch.empty_like(h), torch.empty_like(norm)
        maps = (cache_groups(x) for x in (h, channels_last(dz), dh))
        rows = (x.split(len(activated[0])) for x in (norm, mean, response, scale, sums))
        for a, h_i, dz_i, dh_i, norm_i, mean_i, response_i, scale_i, r in zip(activated, *maps, *rows, strict=True):
            da = _grn_backward(dz_i, a, gamma, norm_i, mean_i, response_i, scale_i, sums=r)
            _gelu_backward(da, h_i, out=dh_i)
        return dh, (sums * response).sum(dim=0).view_as(gamma), None


def _grn_backward(
    dz: Tensor, a: Tensor, gamma: Tensor, norm: Tensor, mean: Tensor, response: Tensor, scale: Tensor, *, sums: Tensor
) -> Tensor:
    """Return dL/da of ``_GeluGRN``, and write the sums r over space into ``sums``."""
    da = dz * a
    torch.sum(da, dim=(2, 3), keepdim=True, dtype=sums.dtype, out=sums)
    q = gamma.view(1, -1, 1, 1) * sums
    dnorm = (q - (q * response).mean(dim=1, keepdim=True)) / mean
    return _through_scale_and_norm(dz, a, norm, scale, dnorm, out=da)


def _through_scale_and_norm(
    dz: Tensor, a: Tensor, norm: Tensor, scale: Tensor, dnorm: Tensor, *, out: Tensor
) -> Tensor:
    """Write ``scale * dz + a / norm * dnorm`` into ``out``, and return it."""
    torch.mul(dz, scale, out=out)
    share = torch.div(dnorm, norm.masked_fill(norm == 0, math.inf), out=torch.empty_like(dnorm, dtype=a.dtype))
    return out.addcmul_(a, share)


class _GRN(torch.autograd.Function):
    """z = a * s + beta, as ``_GeluGRN`` without the GELU; keeps what autograd would keep, a and small tensors.

    Autograd goes through a map about 19 times for these gradients (26 times in half precision), this function 10 times.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        norm = norm_over_space(a)
        mean = norm.mean(dim=1, keepdim=True) + eps
        response = norm / mean
        scale = _scale(response, gamma, a.dtype)
        ctx.save_for_backward(a, gamma, norm, mean, response, scale)
        return torch.addcmul(beta.view(1, -1, 1, 1).to(a.dtype), a, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dz: Tensor) -> tuple[Tensor | None, ...]:
        a, gamma, norm, mean, response, scale = ctx.saved_tensors
        dz = channels_last(dz)
        da = dz * a
        sums = da.sum(dim=(2, 3), keepdim=True, dtype=norm.dtype)
        dgamma = sums * response  # of each sample; the mean of q * n is a matrix-vector product with it
        with autocast_off(dz.device.type):
            minus = torch.addmv(mean.flatten(), dgamma.flatten(1), gamma.flatten(), beta=0, alpha=-1 / gamma.numel())
        dnorm = torch.addcmul(minus.view_as(mean), gamma.view(1, -1, 1, 1), sums) / mean
        da = _through_scale_and_norm(dz, a, norm, scale, dnorm, out=da)
        dbeta = dz.sum(dim=(0, 2, 3), dtype=gamma.dtype).view_as(gamma)
        return da, dgamma.sum(dim=0).view_as(gamma), dbeta, None


def grn(module: GRN, a: Tensor) -> Tensor:
    """Return ``module(a)``. Shape: (B, K, H, W) -> same."""
    return _GRN.apply(a, module.gamma, module.beta, module.eps)


def grn_scale(norm: Tensor, gamma: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the factor by which ``GRN`` multiplies its input, from the input's norm, (B, K, 1, 1) -> same."""
    return _scale(norm / (norm.mean(dim=1, keepdim=True) + eps), gamma, dtype)


def _scale(response: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    scale = gamma.view(1, -1, 1, 1) * response
    return torch.add(scale, 1.0, out=torch.empty_like(scale, dtype=dtype))


def gelu_grn(grn: GRN, h: Tensor) -> Tensor:
    """Return ``grn(F.gelu(h)) - grn.beta``: the linear layer that follows adds the shift at no cost.

    Shape: (B, K, H, W) -> same.
    """
    return _GeluGRN.apply(h, grn.gamma, grn.eps)


class _WeightedSum(torch.autograd.Function):
    """y = w_1 x_1 + w_2 x_2 + ... with weights w = f(mean over space of x_1 + x_2 + ...), one per sample and channel.

    dL/dw_j = sum over space of dL/dy * x_j, from which autograd finds p = dL/d mean;
    dL/dx_j = w_j * dL/dy + p / (H * W).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, weigh: Callable[[Tensor], Tensor], parameters: list[Tensor], num_maps: int, *flat: Tensor
    ) -> Tensor:
        maps = flat[:num_maps]
        pooled = _pooled([x.detach() for x in maps])
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):  # small: kept under checkpointing too
            ctx.leaf = pooled.requires_grad_()
            ctx.weights = weigh(pooled)
        ctx.parameters = parameters
        ctx.save_for_backward(*maps)
        return _weighted(maps, ctx.weights.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, grad = ctx.saved_tensors, channels_last(grad) if on_cpu(grad) else grad
        dweights = torch.empty_like(ctx.weights)  # (B, C, n, 1, 1)
        for x, dweight in zip(maps, dweights.unbind(dim=2), strict=True):
            torch.sum(grad * x, dim=(2, 3), keepdim=True, dtype=dweight.dtype, out=dweight)
        wanted = [ctx.leaf, *ctx.parameters]
        dpooled, *dparameters = torch.autograd.grad(ctx.weights, wanted, dweights, retain_graph=True)
        dpooled = dpooled / (grad.shape[2] * grad.shape[3])
        dmaps = [torch.addcmul(dpooled, grad, w) for w in ctx.weights.detach().unbind(dim=2)]
        return None, None, None, *dmaps, *dparameters


class _AddPosition(torch.autograd.Function):
    """y = x + pos with the map ``pos[d, h, w] = table[w - h + H, d]`` in the type of x.

    In memory, a map whose rows are H + W positions apart is one whose rows are H + W + 1 apart and shifted by one more
    from row to row. So pos is a view of H copies of the table, and dL/dtable is a sum over the rows of such a view.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, table: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.size, ctx.table = size, table.detach()
        copies = table.new_empty(size[0], *table.shape, dtype=x.dtype).copy_(table)
        return x + _diagonals(copies, size).permute(2, 0, 1)  # (H, W, D) -> (D, H, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        copies = ctx.table.new_zeros(ctx.size[0], *ctx.table.shape)
        rows = grad.permute(0, 2, 3, 1)  # (B, D, H, W) -> (B, H, W, D)
        torch.sum(rows, dim=0, dtype=copies.dtype, out=_diagonals(copies, ctx.size))
        return grad, copies.sum(dim=0), None


def _diagonals(copies: Tensor, size: Sequence[int]) -> Tensor:
    """Return the elements ``copies[h, w - h + H]`` as a view, (H, H + W + 1, D) -> (H, W, D)."""
    (height, width), dim = size, copies.shape[2]
    return copies.as_strided((height, width, dim), ((height + width) * dim, dim, 1), height * dim)


def add_position(position: RelativePosition, x: Tensor) -> Tensor:
    """Return ``position(x)``. Shape: (B, D, H, W) -> same."""
    return _AddPosition.apply(x, position.table, position.size)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _pooled(maps: Sequence[Tensor]) -> Tensor:
    means = maps[0].new_empty(len(maps), *maps[0].shape[:2], 1, 1)
    for x, mean in zip(maps, means, strict=True):
        torch.mean(x, dim=(2, 3), keepdim=True, dtype=mean.dtype, out=mean)
    return means.sum(dim=0)


def _weighted(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    first, *others = zip(weights.unbind(dim=2), maps, strict=True)
    out = first[0] * first[1]
    for weight, x in others:
        out = torch.addcmul(out, weight, x)
    return out


def weighted_sum(*maps: Tensor, weigh: Callable[[Tensor], Tensor], modules: Sequence[nn.Module]) -> Tensor:
    """Return the sum of n maps with weights that a small network finds from the mean over space of their plain sum.

    Args:
        maps: n maps that require gradients.
        weigh: (B, C, 1, 1) -> (B, C, n, 1, 1).
        modules: where the parameters of ``weigh`` are.
    Shape: n x (B, C, H, W) -> same.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return _WeightedSum.apply(weigh, parameters, len(maps), *maps, *parameters)
