"""Chains of cheap functions and linear layers over the channels that keep little for the backward pass.

The channel mixing is such a chain: a linear layer (1x1 convolution), whose matrix product is dear, after something
cheap, such as a normalisation or a GELU. Autograd keeps what the cheap function gives and usually its parts too; a
`linear_chain` keeps what goes into it. See `models.fast.autograd` for where this applies.

Legend: B batch, C channels, H rows, W columns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from ..layers import PointwiseLinear, autocast_dtype, joined
from .autograd import aten, autocast_as_before, channels_last, eager, product_dtype, untouched

# Positions (samples * rows * columns) that a CPU thread takes at a time: what one operation writes, the next finds in
# its cache.
CHUNK_POSITIONS = 3136


@dataclass(frozen=True)
class Step:
    """One link of a `linear_chain`: ``x -> linear(prepare(x) + shift)``.

    Args:
        linear: linear layer over the channels of a map.
        prepare: cheap differentiable function that treats samples apart; it runs again in the backward pass.
        modules: where the parameters of `prepare` are.
        shift: added to each position, one value a channel; None adds nothing.
    """

    linear: PointwiseLinear
    prepare: Callable[[Tensor], Tensor]
    modules: Sequence[nn.Module] = ()
    shift: Tensor | None = None

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in, 1, 1), and bias with the shift in it, of `linear`, in the type of its matrix product."""
        weight, bias = self.linear.weight, self.linear.bias
        if self.shift is not None:
            moved = weight @ self.shift
            bias = moved if bias is None else bias + moved
        dtype = product_dtype(weight)
        return weight[:, :, None, None].to(dtype), None if bias is None else bias.to(dtype)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of `prepare` that are being trained."""
        return [p for module in self.modules for p in module.parameters() if p.requires_grad]


def linear_chain(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """Each step after the other, the first over `x`.

    Shape: (B, C, H, W) -> (B, outputs of the last linear layer, H, W).
    """
    if not eager(x) or not all(untouched(step.linear, PointwiseLinear) for step in steps):
        return _plain_chain(x, steps)
    weights = [tensor for step in steps for tensor in step.folded()]
    parameters = [step.parameters() for step in steps]
    flat = (x, *weights, *(p for group in parameters for p in group))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat):
        return _LinearChain.apply(steps, parameters, *flat)
    return joined([_run(part, steps, weights)[-1] for part in _chunks(x)])


def _plain_chain(x: Tensor, steps: Sequence[Step]) -> Tensor:
    for step in steps:
        x = step.prepare(x)
        if untouched(step.linear, PointwiseLinear):
            x = F.conv2d(x, *step.folded())
        else:
            x = step.linear(x if step.shift is None else x + step.shift.view(1, -1, 1, 1))
    return x


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Groups of samples that go through a chain together: on the CPU as many as its caches hold, else all."""
    if x.device.type != "cpu":
        return (x,)
    positions = len(x) * x.shape[2] * x.shape[3]
    count = min(len(x), math.ceil(positions / (CHUNK_POSITIONS * torch.get_num_threads())))
    return x.tensor_split(max(count, 1))


def _run(x: Tensor, steps: Sequence[Step], weights: Sequence[Tensor | None]) -> list[Tensor]:
    """What each step gives for one group of samples."""
    outputs = []
    for step, weight, bias in zip(steps, weights[::2], weights[1::2], strict=True):
        x = F.conv2d(step.prepare(x), weight, bias)
        outputs.append(x)
    return outputs


class _LinearChain(torch.autograd.Function):
    """x -> W_k f_k(... W_1 f_1(x) + b_1 ...) + b_k with cheap f; keeps x and the output of each W but the last.

    Back through a step, with d the gradient at its output and z = f(x), which is rebuilt under autograd:
    dL/dW = sum over samples and positions of d z^T,  dL/db = that of d,  and autograd goes on from dL/dz = W^T d.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, steps: Sequence[Step], parameters: list[list[nn.Parameter]], x: Tensor, *flat: Tensor
    ) -> Tensor:
        weights = flat[: 2 * len(steps)]
        outputs = [_run(part, steps, weights) for part in _chunks(x.detach())]
        ctx.device, ctx.autocast = x.device.type, autocast_dtype(x.device.type)
        ctx.steps, ctx.parameters = steps, parameters
        ctx.save_for_backward(x, *weights, *(output for part in outputs for output in part[:-1]))
        return joined([part[-1] for part in outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        steps, last = ctx.steps, len(ctx.steps) - 1
        weights, between = saved[: 2 * len(steps)], saved[2 * len(steps) :]
        into_x: list[Tensor | None] = []
        into_steps: list[list[Tensor | None]] = [[] for _ in steps]
        chunks = _chunks(x)
        for number, d in enumerate(channels_last(grad).tensor_split(len(chunks))):
            for i in range(last, -1, -1):
                taken = chunks[number] if i == 0 else between[number * last + i - 1]
                d, into_step = _back(ctx, i, taken, weights[2 * i : 2 * i + 2], d)
                into_steps[i] = _added(into_steps[i], into_step, several=len(chunks) > 1)
            into_x.append(d)
        dx = joined(into_x) if ctx.needs_input_grad[2] else None
        pairs = [tensor for grads in into_steps for tensor in grads[:2]]
        return None, None, dx, *pairs, *(tensor for grads in into_steps for tensor in grads[2:])


def _back(
    ctx: FunctionCtx, index: int, x: Tensor, weights: Sequence[Tensor | None], d: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Through one step of a `_LinearChain`: the gradient of its input, and those of its weight, bias and parameters."""
    step, parameters, (weight, bias) = ctx.steps[index], ctx.parameters[index], weights
    if any(now is not then for now, then in zip(step.parameters(), parameters, strict=True)):
        raise RuntimeError("parameters were replaced between forward and backward: run both inside plain_autograd()")
    with torch.enable_grad(), autocast_as_before(ctx):
        leaf = x.detach().requires_grad_(index > 0 or ctx.needs_input_grad[2])
        z = step.prepare(leaf)
    dz, dweight, _ = aten.convolution_backward(
        d, z.detach(), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [z.requires_grad, True, False]
    )
    dbias = None if bias is None else d.sum(dim=(0, 2, 3))  # sooner than by the convolution
    wanted = [t for t in (leaf, *parameters) if t.requires_grad]
    found = list(torch.autograd.grad(z, wanted, dz, allow_unused=True)) if wanted else []
    dx = found.pop(0) if leaf.requires_grad else None
    return dx, [dweight, dbias, *found]


def _added(totals: list[Tensor | None], parts: list[Tensor | None], *, several: bool) -> list[Tensor | None]:
    """`totals` plus `parts`, one by one; sums of several half-precision parts are taken in float32."""
    if several:
        parts = [None if p is None else p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts]
    if not totals:
        return parts
    return [t if p is None else t.add_(p) for t, p in zip(totals, parts, strict=True)]
