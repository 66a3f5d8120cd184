"""The hand-written gradients against PyTorch's own, element by element, and where they must step aside."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import StripMLPNet, layers
from models.blocks import LSMM, StripMLPBlock
from models.fast import autograd as lean
from models.fast import linear_chain
from models.fast.depthwise import DepthwiseConv2d
from models.layers import GRN, PointwiseLinear
from tests.golden.load import golden_model, images, soft_cross_entropy, training_step
from tests.reference_model import ReferenceStripMLP


def noise(*shape: int, seed: int = 1) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few samples of a tiny map make several groups, as those of a large map do."""
    monkeypatch.setattr(layers, "CACHED_BYTES", 1)
    monkeypatch.setattr(linear_chain, "CHUNK_POSITIONS", 32)


def both_ways(call: Callable[[], Tensor], *tensors: Tensor) -> None:
    """Assert that `call` gives the same value and gradients inside and outside `plain_autograd`."""
    weights = None
    results = []
    for context in (lean.plain_autograd, torch.enable_grad):
        with context():
            out = call()
            weights = torch.randn_like(out) if weights is None else weights
            results.append((out, *torch.autograd.grad(out, tensors, weights)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("halves", (False, True))
def test_norm_gelu(halves: bool) -> None:
    norm, x = randomised(nn.BatchNorm2d(4)), noise(3, 4, 5, 5).requires_grad_()

    def call() -> Tensor:
        out = lean.norm_gelu(norm, x, halves=halves)
        return torch.cat([2 * out[0], out[1].square()], dim=1) if halves else out

    both_ways(call, x, norm.weight, norm.bias)
    assert norm.num_batches_tracked == 2


def test_norm_gelu_moves_the_running_statistics_alike() -> None:
    x, norms = noise(3, 4, 5, 5).requires_grad_(), [nn.BatchNorm2d(4, momentum=m).double() for m in (0.1, 0.1, None)]
    lean.norm_gelu(norms[0], x)
    with lean.plain_autograd():
        lean.norm_gelu(norms[1], x)
    lean.norm_gelu(norms[2], x)  # without momentum: PyTorch's own
    for name, buffer in norms[0].named_buffers():
        assert torch.equal(buffer, norms[1].get_buffer(name))
    assert not torch.equal(norms[2].running_mean, norms[1].running_mean)


@pytest.mark.usefixtures("small_groups")
def test_gelu_grn() -> None:
    grn, h = randomised(GRN(6)), noise(3, 6, 4, 4).requires_grad_()
    both_ways(lambda: lean.gelu_grn(grn, h), h, grn.gamma)
    torch.testing.assert_close(lean.gelu_grn(grn, h) + grn.beta.view(1, -1, 1, 1), grn(F.gelu(h)))


@pytest.mark.usefixtures("small_groups")
def test_gelu_grn_of_silent_channels() -> None:
    grn, h = randomised(GRN(3)), noise(2, 3, 4, 4)
    h[:, 1] = 0.0
    h.requires_grad_()
    both_ways(lambda: lean.gelu_grn(grn, h), h, grn.gamma)


@pytest.mark.parametrize("kernel_size", ((7, 7), (3, 7), (3, 5)))
@pytest.mark.parametrize("size", (1, 2, 9))
def test_depthwise_convolution(kernel_size: tuple[int, int], size: int) -> None:
    conv, x = randomised(DepthwiseConv2d(3, kernel_size)), noise(2, 3, size, size).requires_grad_()
    both_ways(lambda: conv(x), x, conv.weight)


def test_weighted_sum() -> None:
    lsmm, v = randomised(LSMM(4)), noise(3, 4, 6, 6).requires_grad_()
    both_ways(lambda: lsmm(v), v, *lsmm.parameters())


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("needed", (True, False))
def test_linear_chain(needed: bool) -> None:
    conv, shift = randomised(DepthwiseConv2d(3, (3, 3))), noise(5, seed=3).requires_grad_()
    first, second = randomised(PointwiseLinear(3, 5)), randomised(PointwiseLinear(5, 2, bias=False))
    x = noise(5, 3, 4, 4).requires_grad_(needed)
    steps = [linear_chain.Step(first, conv, [conv]), linear_chain.Step(second, torch.tanh, shift=shift)]
    weights = (*conv.parameters(), *first.parameters(), *second.parameters(), shift)
    both_ways(lambda: linear_chain.linear_chain(x, steps), *([x] if needed else []), *weights)


def test_linear_chain_without_gradients_and_with_frozen_parts() -> None:
    conv, linear = randomised(DepthwiseConv2d(3, (3, 3))), randomised(PointwiseLinear(3, 5))
    x = noise(2, 3, 4, 4)
    call = partial(linear_chain.linear_chain, x, [linear_chain.Step(linear, conv, [conv])])
    with torch.no_grad():
        torch.testing.assert_close(call(), linear(conv(x)))
    conv.requires_grad_(False)
    both_ways(call, linear.weight, linear.bias)
    linear.weight.requires_grad_(False)
    both_ways(call, linear.bias)


@pytest.mark.parametrize("drop_path_rate", (0.0, 0.2))
def test_network_both_ways(drop_path_rate: float) -> None:
    lean_model, plain_model = (golden_model("nano80", drop_path_rate=drop_path_rate).double() for _ in range(2))
    x = images("nano80", 6).double()
    torch.manual_seed(0)
    loss, logits = training_step(lean_model, x)
    torch.manual_seed(0)
    with lean.plain_autograd():
        expected = training_step(plain_model, x)
    torch.testing.assert_close((loss, logits), expected)
    for (name, p), q in zip(lean_model.named_parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12, msg=name)
    for (name, p), q in zip(lean_model.named_buffers(), plain_model.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_differentiating_twice() -> None:
    block, x = randomised(StripMLPBlock(4, 4, 2)), noise(2, 4, 4, 4).requires_grad_()

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    with pytest.raises(RuntimeError, match="differentiate twice"):
        penalty().backward()
    with lean.plain_autograd():
        penalty().backward()
    assert x.grad.abs().sum() > 0


def test_backward_twice_over_a_kept_graph() -> None:
    block, x = randomised(StripMLPBlock(4, 4, 2)), noise(2, 4, 4, 4).requires_grad_()
    loss = block(x).square().sum()
    first = torch.autograd.grad(loss, [x, *block.parameters()], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [x, *block.parameters()]), first)


def test_parameters_replaced_between_forward_and_backward() -> None:
    block, x = randomised(StripMLPBlock(4, 4, 2)), noise(2, 4, 4, 4).requires_grad_()
    others = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    loss = torch.func.functional_call(block, others, (x,)).square().sum()
    with pytest.raises(RuntimeError, match="plain_autograd"):
        loss.backward()


def test_replaced_and_hooked_modules_are_called() -> None:
    class Doubled(PointwiseLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block, x = randomised(StripMLPBlock(4, 4, 2)), noise(2, 4, 4, 4).requires_grad_()
    before = block.channel_mixing(x)
    doubled = Doubled(12, 4).double()
    doubled.load_state_dict(block.channel_mixing.fc2.state_dict())
    block.channel_mixing.fc2 = doubled
    torch.testing.assert_close(block.channel_mixing(x), 2 * before)
    calls = []
    for module in block.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, _inputs, _output: calls.append(module))
    block(x)
    assert {type(m) for m in calls} >= {Doubled, PointwiseLinear, nn.BatchNorm2d, nn.Conv2d, DepthwiseConv2d}


def test_synchronised_batch_norm_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = golden_model("nano32"), images("nano32", 4)
    expected = training_step(model, x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(golden_model("nano32"))
    calls = []
    forward = nn.SyncBatchNorm.forward
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda norm, x: calls.append(norm) or forward(norm, x))
    torch.testing.assert_close(training_step(synchronised, x), expected)
    assert len(calls) == sum(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules())


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters aside, a storage counted once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = soft_cross_entropy(model(x))
    assert loss.isfinite()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_less_memory_than_the_published_formulation() -> None:
    arguments = {"img_size": 64, "num_classes": 10, "embed_dim": 32, "depths": (2, 2, 4, 2)}
    x = images("nano32", 8)
    reference = kept_bytes(ReferenceStripMLP(**arguments), x)
    model = StripMLPNet(**arguments)
    with lean.plain_autograd():
        assert kept_bytes(model, x) < reference
    assert kept_bytes(model, x) < 0.55 * reference


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", ("lean", "plain", "inference"))
def test_autocast_makes_no_float32_maps(dtype: torch.dtype, form: str) -> None:
    """Every map is in half precision; only norms over space, one value a channel, may be float32."""
    model, x = golden_model("nano32", drop_path_rate=0.2), images("nano32", 4)
    model = model.to_inference() if form == "inference" else model
    seen: list[tuple[str, torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor) and t.dim() >= 4 and t.shape[0] in (3, 4) and min(t.shape[-2:]) > 1:
                    seen.append((str(func), t.dtype))
            return out

    with Watch(), lean.plain_autograd() if form == "plain" else nullcontext(), torch.autocast("cpu", dtype):
        model(x)
    wrong = [name for name, found in seen[1:] if found != dtype and "_to_copy" not in name]
    assert not wrong
    assert sum(found != dtype for _, found in seen) <= 1  # the images before their cast


@pytest.mark.parametrize("dtype", HALF)
def test_training_under_autocast_is_close(dtype: torch.dtype) -> None:
    x, models = images("nano32", 4), [golden_model("nano32") for _ in range(3)]
    losses = []
    for model, context in zip(models, (None, nullcontext(), lean.plain_autograd()), strict=True):
        with context or nullcontext():
            with torch.autocast("cpu", dtype, enabled=context is not None):
                loss = soft_cross_entropy(model(x).float())
            (loss * 1024).backward()
        losses.append(loss.item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=2e-2)
    gradients = zip(models[0].named_parameters(), models[1].parameters(), models[2].parameters(), strict=True)
    for (name, exact), half, plain in gradients:
        assert half.grad.dtype == torch.float32
        size = exact.grad.norm()
        if size > 1e-2:  # no more off than PyTorch's own operations are
            allowed = max(0.05 * size, 2 * (plain.grad - exact.grad).norm())
            assert (half.grad - exact.grad).norm() <= allowed, name
