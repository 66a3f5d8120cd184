"""Chains of cheap functions and linear layers over the channels that keep little for the backward pass.

The channel mixing is such a chain: each linear layer (1x1 convolution), whose matrix product is expensive, follows
something cheap, such as a normalisation or a GELU. Autograd keeps the output of the cheap function, and usually its
intermediate results too; a ``linear_chain`` keeps its input.

Legend: B batch, C channels, H rows, W columns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from ..layers import PointwiseLinear, autocast_dtype
from .autograd import aten, autocast_as_before
from .ops import cat_groups, channels_last, on_cpu, product_dtype

# Positions (samples * rows * columns) per CPU thread in one group: what one operation writes, the next finds in the
# cache.
GROUP_POSITIONS = 3136


@dataclass(frozen=True)
class ChainLink:
    """One link of a ``linear_chain``: ``x -> linear(prepare(x) + shift)``.

    Args:
        linear: linear layer over the channels of a map.
        prepare: cheap differentiable function that treats each sample alone; it runs again in the backward pass.
        modules: where the parameters of ``prepare`` are.
        shift: one value per channel, added at each position; None adds nothing.
    """

    linear: PointwiseLinear
    prepare: Callable[[Tensor], Tensor]
    modules: Sequence[nn.Module] = ()
    shift: Tensor | None = None

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight (out, in, 1, 1) and the bias of ``linear``, shift included, in the type of its product."""
        weight, bias = self.linear.weight, self.linear.bias
        if self.shift is not None:
            moved = weight @ self.shift
            bias = moved if bias is None else bias + moved
        dtype = product_dtype(weight)
        return weight[:, :, None, None].to(dtype), None if bias is None else bias.to(dtype)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of ``prepare`` that are trained."""
        return [p for module in self.modules for p in module.parameters() if p.requires_grad]


def linear_chain(x: Tensor, links: Sequence[ChainLink]) -> Tensor:
    """Apply each link to what the one before it returns, the first to ``x``.

    Shape: (B, C, H, W) -> (B, outputs of the last linear layer, H, W).
    """
    weights = [tensor for link in links for tensor in link.folded()]
    parameters = [link.parameters() for link in links]
    flat = (x, *weights, *(p for group in parameters for p in group))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat):
        return _LinearChain.apply(links, parameters, *flat)
    return cat_groups([_run(part, links, weights)[-1] for part in _groups(x)])


def _groups(x: Tensor) -> tuple[Tensor, ...]:
    """Split the samples into the groups that go through a chain together: on the CPU what its caches hold, else all."""
    if not on_cpu(x):
        return (x,)
    positions = len(x) * x.shape[2] * x.shape[3]
    count = min(len(x), math.ceil(positions / (GROUP_POSITIONS * torch.get_num_threads())))
    return x.tensor_split(max(count, 1))


def _run(x: Tensor, links: Sequence[ChainLink], weights: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the output of each link for one group of samples."""
    outputs = []
    for link, weight, bias in zip(links, weights[::2], weights[1::2], strict=True):
        x = F.conv2d(link.prepare(x), weight, bias)
        outputs.append(x)
    return outputs


class _LinearChain(torch.autograd.Function):
    """x -> W_k f_k(... W_1 f_1(x) + b_1 ...) + b_k with cheap f; keeps x and the output of each W but the last.

    Back through a link, with d the gradient at its output and z = f(x), which is rebuilt under autograd:
    dL/dW = sum over samples and positions of d z^T,  dL/db = that of d,  and autograd goes on from dL/dz = W^T d.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, links: Sequence[ChainLink], parameters: list[list[nn.Parameter]], x: Tensor, *flat: Tensor
    ) -> Tensor:
        weights = flat[: 2 * len(links)]
        outputs = [_run(part, links, weights) for part in _groups(x.detach())]
        ctx.device, ctx.autocast = x.device.type, autocast_dtype(x.device.type)
        ctx.links, ctx.parameters = links, parameters
        ctx.save_for_backward(x, *weights, *(output for part in outputs for output in part[:-1]))
        return cat_groups([part[-1] for part in outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        links, last = ctx.links, len(ctx.links) - 1
        weights, between = saved[: 2 * len(links)], saved[2 * len(links) :]
        into_x: list[Tensor | None] = []
        into_links: list[list[Tensor | None]] = [[] for _ in links]
        groups = _groups(x)
        for number, d in enumerate(channels_last(grad).tensor_split(len(groups))):
            for i in range(last, -1, -1):
                taken = groups[number] if i == 0 else between[number * last + i - 1]
                d, into_link = _back(ctx, i, taken, weights[2 * i : 2 * i + 2], d)
                into_links[i] = _added(into_links[i], into_link, several=len(groups) > 1)
            into_x.append(d)
        dx = cat_groups(into_x) if ctx.needs_input_grad[2] else None
        pairs = [tensor for grads in into_links for tensor in grads[:2]]
        return None, None, dx, *pairs, *(tensor for grads in into_links for tensor in grads[2:])


def _back(
    ctx: FunctionCtx, index: int, x: Tensor, weights: Sequence[Tensor | None], d: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of a link's input, and of its weight, bias and parameters, from that of its output ``d``."""
    link, parameters, (weight, bias) = ctx.links[index], ctx.parameters[index], weights
    if any(now is not then for now, then in zip(link.parameters(), parameters, strict=True)):
        raise RuntimeError(
            "parameters were replaced between the forward and the backward pass, which the hand-written gradients "
            "cannot follow; use a network without models.fast.accelerate for that"
        )
    with torch.enable_grad(), autocast_as_before(ctx):
        leaf = x.detach().requires_grad_(index > 0 or ctx.needs_input_grad[2])
        z = link.prepare(leaf)
    dz, dweight, _ = aten.convolution_backward(
        d, z.detach(), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [z.requires_grad, True, False]
    )
    dbias = None if bias is None else d.sum(dim=(0, 2, 3))  # faster than by the convolution
    wanted = [t for t in (leaf, *parameters) if t.requires_grad]
    found = list(torch.autograd.grad(z, wanted, dz, allow_unused=True)) if wanted else []
    dx = found.pop(0) if leaf.requires_grad else None
    return dx, [dweight, dbias, *found]


def _added(totals: list[Tensor | None], parts: list[Tensor | None], *, several: bool) -> list[Tensor | None]:
    """Return ``totals`` plus ``parts``, one by one; several half-precision parts are summed in float32."""
    if several:
        parts = [None if p is None else p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts]
    if not totals:
        return parts
    return [t if p is None else t.add_(p) for t, p in zip(totals, parts, strict=True)]
