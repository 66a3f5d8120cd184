"""Chains of cheap functions and linear layers over the channels that keep little for the backward pass.

Most of the network is such a chain: a linear layer (1x1 convolution), whose matrix product is dear, after something
cheap, such as a normalisation or a GELU. Autograd keeps what the cheap function gives and usually its parts
too; a `linear_chain` keeps what goes into it. See `models.lean` for where this applies.

Legend: B batch, H rows, W columns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from .layers import PointwiseLinear, autocast_dtype, joined
from .lean import autocast_as_before, channels_last, eager, product_dtype, untouched

# Positions (samples * rows * columns) that a CPU thread takes at a time: what one operation writes, the next finds in
# its cache.
CHUNK_POSITIONS = 3136


@dataclass(frozen=True)
class Step:
    """One link of a `linear_chain`: ``x -> linear(prepare(x) + shift)``.

    Args:
        linear: 1x1 convolution, or linear layer over the channels of a map.
        prepare: cheap differentiable function that treats samples apart; it runs again in the backward pass.
        modules: where the parameters of `prepare` are.
        shift: added to each position, one value a channel; None adds nothing.
    """

    linear: nn.Conv2d | PointwiseLinear
    prepare: Callable[..., Tensor]
    modules: Sequence[nn.Module] = ()
    shift: Tensor | None = None

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in, 1, 1), and bias with the shift in it, of `linear`, in the type of its matrix product."""
        weight, bias = self.linear.weight, self.linear.bias
        if self.shift is not None:
            moved = weight.flatten(1) @ self.shift
            bias = moved if bias is None else bias + moved
        dtype = product_dtype(weight)
        weight = weight.view(*weight.shape[:2], 1, 1).to(dtype)
        return weight, None if bias is None else bias.to(dtype)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of `prepare` that are being trained."""
        return [p for module in self.modules for p in module.parameters() if p.requires_grad]


def linear_chain(*inputs: Tensor, steps: Sequence[Step]) -> Tensor:
    """Each step after the other, the first over `inputs`.

    Shape: maps (B, ..., H, W) -> (B, outputs of the last linear layer, H, W).
    """
    if not eager(inputs[0]) or not all(untouched(step.linear, nn.Conv2d, PointwiseLinear) for step in steps):
        return _plain_chain(inputs, steps)
    weights = [tensor for step in steps for tensor in step.folded()]
    parameters = [step.parameters() for step in steps]
    flat = (*inputs, *weights, *(p for group in parameters for p in group))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat):
        return _LinearChain.apply(steps, parameters, len(inputs), *flat)
    return joined([_run(part, steps, weights)[-1] for part in _chunks(inputs)])


def _plain_chain(inputs: Sequence[Tensor], steps: Sequence[Step]) -> Tensor:
    for step in steps:
        x = step.prepare(*inputs)
        if untouched(step.linear, nn.Conv2d, PointwiseLinear):
            x = F.conv2d(x, *step.folded())
        else:
            x = step.linear(x if step.shift is None else x + step.shift.view(1, -1, 1, 1))
        inputs = (x,)
    return inputs[0]


def _chunks(maps: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Groups of samples that go through a chain together: on the CPU as many as its caches hold, else all."""
    first, count = maps[0], 1
    if first.device.type == "cpu":
        positions = len(first) * first.shape[-2] * first.shape[-1]
        count = min(len(first), math.ceil(positions / (CHUNK_POSITIONS * torch.get_num_threads())))
    return list(zip(*(x.tensor_split(max(count, 1)) for x in maps), strict=True))


def _like(x: Tensor, parts: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient of `x` from those of its groups of samples, in the memory order of `x`."""
    if parts[0] is None or len(parts) == 1:
        return parts[0]
    whole = torch.empty_like(x)
    for piece, part in zip(whole.tensor_split(len(parts)), parts, strict=True):
        piece.copy_(part)
    return whole


def _run(inputs: Sequence[Tensor], steps: Sequence[Step], weights: Sequence[Tensor | None]) -> list[Tensor]:
    """What each step gives for one group of samples."""
    outputs: list[Tensor] = []
    for step, weight, bias in zip(steps, weights[::2], weights[1::2], strict=True):
        outputs.append(F.conv2d(step.prepare(*inputs), weight, bias))
        inputs = outputs[-1:]
    return outputs


class _LinearChain(torch.autograd.Function):
    """x -> W_k f_k(... W_1 f_1(x) + b_1 ...) + b_k with cheap f; keeps x and the output of each W but the last.

    Back through a step, with d the gradient at its output and z = f(x), which is rebuilt under autograd:
    dL/dW = sum over samples and positions of d z^T,  dL/db = that of d,  and autograd goes on from dL/dz = W^T d.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, steps: Sequence[Step], parameters: list[list[nn.Parameter]], num_inputs: int, *flat: Tensor
    ) -> Tensor:
        inputs, weights = flat[:num_inputs], flat[num_inputs : num_inputs + 2 * len(steps)]
        outputs = [_run(part, steps, weights) for part in _chunks([x.detach() for x in inputs])]
        ctx.device, ctx.autocast = inputs[0].device.type, autocast_dtype(inputs[0].device.type)
        ctx.steps, ctx.parameters, ctx.num_inputs = steps, parameters, num_inputs
        ctx.save_for_backward(*inputs, *weights, *(x for part in outputs for x in part[:-1]))
        return joined([part[-1] for part in outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        steps, count, saved = ctx.steps, ctx.num_inputs, ctx.saved_tensors
        last = len(steps) - 1
        weights, between = saved[count : count + 2 * len(steps)], saved[count + 2 * len(steps) :]
        chunks = _chunks(saved[:count])
        into_inputs: list[list[Tensor | None]] = []
        into_steps: list[list[Tensor | None]] = [[] for _ in steps]
        for number, d in enumerate(channels_last(grad).tensor_split(len(chunks))):
            for i in range(last, -1, -1):
                inputs = chunks[number] if i == 0 else (between[number * last + i - 1],)
                into_x, into_step = _back(ctx, i, inputs, weights[2 * i : 2 * i + 2], d)
                into_steps[i] = _added(into_steps[i], into_step, several=len(chunks) > 1)
                d = into_x[0]
            into_inputs.append(into_x)
        inputs = [_like(x, parts) for x, parts in zip(saved, zip(*into_inputs, strict=True), strict=False)]
        pairs = [tensor for grads in into_steps for tensor in grads[:2]]
        return None, None, None, *inputs, *pairs, *(tensor for grads in into_steps for tensor in grads[2:])


def _back(
    ctx: FunctionCtx, index: int, inputs: Sequence[Tensor], weights: Sequence[Tensor | None], d: Tensor
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Through one step of a `_LinearChain`: the gradients of its inputs, and of its weight, bias and parameters."""
    step, parameters, (weight, bias) = ctx.steps[index], ctx.parameters[index], weights
    if any(now is not then for now, then in zip(step.parameters(), parameters, strict=True)):
        raise RuntimeError("parameters were replaced between forward and backward: run both inside plain_autograd()")
    needed = ctx.needs_input_grad[3 : 3 + ctx.num_inputs] if index == 0 else (True,)
    with torch.enable_grad(), autocast_as_before(ctx):
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        z = step.prepare(*leaves)
    dz, dweight, _ = torch.ops.aten.convolution_backward(
        d, z.detach(), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [z.requires_grad, True, False]
    )
    dbias = None if bias is None else d.sum(dim=(0, 2, 3))  # sooner than by the convolution
    targets = [*leaves, *parameters]
    wanted = [t for t in targets if t.requires_grad]
    found = iter(torch.autograd.grad(z, wanted, dz, allow_unused=True) if wanted else ())
    grads = [next(found) if t.requires_grad else None for t in targets]
    return grads[: len(leaves)], [dweight, dbias, *grads[len(leaves) :]]


def _added(totals: list[Tensor | None], parts: list[Tensor | None], *, several: bool) -> list[Tensor | None]:
    """`totals` plus `parts`, one by one; sums of several half-precision parts are taken in float32."""
    if several:
        parts = [None if p is None else p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts]
    if not totals:
        return parts
    return [t if p is None else t.add_(p) for t, p in zip(totals, parts, strict=True)]
