"""Training in less memory and time: the same functions with gradients written down by hand.

Autograd keeps every intermediate map for the backward pass and walks through memory once for each small operation. The
functions here and in `models.linear_chain` keep the inputs of a group of cheap operations and rebuild the rest in the
backward pass. Values and gradients are those of the plain formulation, which each docstring states. It runs instead

- on devices where it was not measured (`DEVICES`),
- inside `plain_autograd()`, which differentiating twice needs (the functions here refuse it),
- under torch.compile and in exports, where the compiler does this work itself,
- where a module was replaced, or carries hooks, parametrizations or synchronised statistics.

Legend: B batch, C or K channels, H rows, W columns.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from ..layers import GRN, autocast_dtype, cache_groups, gelu, gelu_, norm_over_space

aten = torch.ops.aten

# Types of device on which this was measured to pay. GPUs were not: there PyTorch runs its own operations, or compiles.
DEVICES = {"cpu"}

_plain_depth = 0


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Inside, the network is built from PyTorch's own operations alone, e.g. to differentiate its gradients."""
    global _plain_depth
    _plain_depth += 1
    try:
        yield
    finally:
        _plain_depth -= 1


def eager(x: Tensor) -> bool:
    """Whether the hand-written gradients may be used for `x` at all."""
    return x.device.type in DEVICES and not (_plain_depth or torch.compiler.is_compiling() or torch.jit.is_tracing())


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether reading the parameters of `module` is the same as calling it."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


def channels_last(x: Tensor) -> Tensor:
    """`x`, copied to channels_last memory order if it has another."""
    return x.contiguous(memory_format=torch.channels_last)


def channels_last_gradient(x: Tensor) -> Tensor:
    """`x`, whose gradient reaches the operations before it in channels_last order: mixed orders slow them down."""
    if eager(x) and x.requires_grad:
        x.register_hook(channels_last)
    return x


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which a product with `tensor` is computed: autocast's where that is on, else its own."""
    return autocast_dtype(tensor.device.type) or tensor.dtype


def autocast_as_before(ctx: FunctionCtx) -> AbstractContextManager[None]:
    """The autocast of the forward pass, which `ctx` holds as `device` and `autocast`, for what runs again behind it."""
    return torch.autocast(ctx.device, ctx.autocast, enabled=ctx.autocast is not None, cache_enabled=False)


def _gelu_backward(grad: Tensor, x: Tensor, *, out: Tensor) -> None:
    """Write ``grad * GELU'(x)`` into `out`, which may be `x`; all three as the contiguous tensors they are."""
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
    """``F.gelu(norm(x))``; with `halves`, the two halves of its channels as maps of their own.

    Shape: (B, C, H, W) -> same, or two of (B, C / 2, H, W).
    """
    lean = eager(x) and torch.is_grad_enabled() and x.requires_grad
    if not (lean and norm.training and untouched(norm, nn.BatchNorm2d) and norm.momentum is not None):
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
            torch.mul(activated[-1], _grn_scale(norms[-1], gamma, eps).to(h.dtype), out=z_i)
        ctx.save_for_backward(h, gamma, torch.cat(norms), *activated)
        ctx.eps = eps
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dz: Tensor) -> tuple[Tensor | None, ...]:
        h, gamma, norm, *activated = ctx.saved_tensors
        mean = norm.mean(dim=1, keepdim=True) + ctx.eps
        response, scale = norm / mean, _grn_scale(norm, gamma, ctx.eps).to(h.dtype)
        dh, sums = torch.empty_like(h), torch.empty_like(norm)
        maps = (cache_groups(x) for x in (h, channels_last(dz), dh))
        rows = (x.split(len(activated[0])) for x in (norm, mean, response, scale, sums))
        for a, h_i, dz_i, dh_i, norm_i, mean_i, response_i, scale_i, r in zip(activated, *maps, *rows, strict=True):
            buffer = dz_i * a
            torch.sum(buffer, dim=(2, 3), keepdim=True, dtype=norm.dtype, out=r)
            q = gamma.view(1, -1, 1, 1) * r
            dnorm = (q - (q * response_i).mean(dim=1, keepdim=True)) / mean_i
            torch.mul(dz_i, scale_i, out=buffer)
            buffer.addcmul_(a, torch.where(norm_i > 0, dnorm / norm_i, 0.0).to(a.dtype))
            _gelu_backward(buffer, h_i, out=dh_i)
        return dh, (sums * response).sum(dim=0).view_as(gamma), None


def _grn_scale(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return 1.0 + gamma.view(1, -1, 1, 1) * (norm / (norm.mean(dim=1, keepdim=True) + eps))


def gelu_grn(grn: GRN, h: Tensor) -> Tensor:
    """``grn(F.gelu(h)) - grn.beta``: the shift is left to the linear layer that follows, which adds it for nothing.

    Shape: (B, K, H, W) -> same.
    """
    if not eager(h):
        a = gelu(h)
        return a * grn.scale(a)
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
        weights = weigh(pooled).to(pooled.dtype)
        ctx.weigh, ctx.parameters = weigh, parameters
        ctx.device, ctx.autocast = pooled.device.type, autocast_dtype(pooled.device.type)
        ctx.save_for_backward(pooled, *maps)
        return _weighted(maps, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        pooled, *maps = ctx.saved_tensors
        grad = channels_last(grad)
        with torch.enable_grad(), autocast_as_before(ctx):
            leaf = pooled.detach().requires_grad_()
            weights = ctx.weigh(leaf).to(leaf.dtype)
        dweights = torch.stack([(grad * x).sum(dim=(2, 3), keepdim=True) for x in maps], dim=2)
        dpooled, *dparameters = torch.autograd.grad(weights, [leaf, *ctx.parameters], dweights)
        dpooled = dpooled / (grad.shape[2] * grad.shape[3])
        dmaps = [torch.addcmul(dpooled, grad, w) for w in weights.detach().unbind(dim=2)]
        return None, None, None, *dmaps, *dparameters


def _pooled(maps: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, (x.mean(dim=(2, 3), keepdim=True) for x in maps))


def _weighted(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    first, *others = zip(weights.unbind(dim=2), maps, strict=True)
    out = first[0] * first[1]
    for weight, x in others:
        out = torch.addcmul(out, weight, x)
    return out


def weighted_sum(*maps: Tensor, weigh: Callable[[Tensor], Tensor], modules: Sequence[nn.Module]) -> Tensor:
    """The sum of n maps with weights that a small network `weigh` finds from the mean over space of their plain sum.

    Args:
        maps: n maps.
        weigh: (B, C, 1, 1) -> (B, C, n, 1, 1).
        modules: where the parameters of `weigh` are.
    Shape: n x (B, C, H, W) -> same.
    """
    if not (eager(maps[0]) and torch.is_grad_enabled() and all(x.requires_grad for x in maps)):
        pooled = _pooled(maps)
        return _weighted(maps, weigh(pooled).to(pooled.dtype))
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return _WeightedSum.apply(weigh, parameters, len(maps), *maps, *parameters)
