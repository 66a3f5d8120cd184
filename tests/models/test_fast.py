"""The hand-written gradients against PyTorch's own, element by element, and where they must step aside."""

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.blocks import LSMM, StripMLPBlock
from models.fast import accelerate, linear_chain, ops
from models.fast.autograd import gelu_grn, norm_gelu
from models.fast.blocks import FastStripMLPBlock, add_residual_of_kept
from models.fast.linear_chain import ChainLink
from models.layers import GRN, ChannelLayerNorm, DepthwiseConv2d, PointwiseLinear, add_residual
from tests.builders import noise, noise_map, randomised, tiny_network
from tests.golden.load import golden_model, images, soft_cross_entropy, training_step
from tests.tiny_run import TinyRun
from tools.bench.reference import ReferenceStripMLP


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few samples of a tiny map make several groups, as those of a large map do."""
    monkeypatch.setattr(ops, "CACHED_BYTES", 1)
    monkeypatch.setattr(linear_chain, "GROUP_POSITIONS", 32)


def assert_same(fast: Callable[[], Tensor], plain: Callable[[], Tensor], *tensors: Tensor) -> None:
    """Assert that two functions give the same value and the same gradients of ``tensors``."""
    weights = None
    results = []
    for call in (plain, fast):
        out = call()
        weights = torch.randn_like(out) if weights is None else weights
        results.append((out, *torch.autograd.grad(out, tensors, weights)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-11)


def assert_accelerated_same(module: nn.Module, x: Tensor) -> None:
    fast = accelerate(copy.copy(module))  # shares the parameters
    assert type(fast) is not type(module)
    assert_same(lambda: fast(x), lambda: module(x), x, *module.parameters())


@pytest.mark.parametrize("halves", (False, True))
def test_norm_gelu(halves: bool) -> None:
    norm, x = randomised(nn.BatchNorm2d(4)), noise_map(3, 4, 5, 5).requires_grad_()

    def joined(halves: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([2 * halves[0], halves[1].square()], dim=1)

    if halves:
        calls = (lambda: joined(norm_gelu(norm, x, halves=True)), lambda: joined(F.gelu(norm(x)).chunk(2, dim=1)))
    else:
        calls = (lambda: norm_gelu(norm, x), lambda: F.gelu(norm(x)))
    assert_same(*calls, x, norm.weight, norm.bias)
    assert norm.num_batches_tracked == 2


def test_norm_gelu_moves_the_running_statistics_alike() -> None:
    x, norms = (
        noise_map(3, 4, 5, 5).requires_grad_(),
        [nn.BatchNorm2d(4, momentum=m).double() for m in (0.1, 0.1, None)],
    )
    norm_gelu(norms[0], x)
    norms[1](x)
    norm_gelu(norms[2], x)  # without momentum: PyTorch's own
    for name, buffer in norms[0].named_buffers():
        assert torch.equal(buffer, norms[1].get_buffer(name))
    assert not torch.equal(norms[2].running_mean, norms[1].running_mean)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("silent", (False, True))
def test_gelu_grn(silent: bool) -> None:
    """Also where a channel is zero everywhere, at which the norm has no derivative."""
    grn, h = randomised(GRN(6)), noise_map(3, 6, 4, 4)
    if silent:
        h[:, 1] = 0.0
    h.requires_grad_()
    shift = grn.beta.view(1, -1, 1, 1)
    assert_same(lambda: gelu_grn(grn, h), lambda: grn(F.gelu(h)) - shift, h, grn.gamma)


@pytest.mark.parametrize("kernel_size", ((7, 7), (3, 7), (3, 5), (3, 3)))
@pytest.mark.parametrize("size", (1, 2, 9))
def test_depthwise_convolution(kernel_size: tuple[int, int], size: int) -> None:
    conv = randomised(DepthwiseConv2d(3, kernel_size))
    assert_accelerated_same(conv, noise_map(2, 3, size, size).requires_grad_())


def test_weighted_sum() -> None:
    assert_accelerated_same(randomised(LSMM(4)), noise_map(3, 4, 6, 6).requires_grad_())


def test_weighted_sum_of_a_float32_map_under_autocast() -> None:
    """The two convolutions make half-precision maps of it."""
    results = []
    for lsmm in (randomised(LSMM(4)).float(), accelerate(randomised(LSMM(4)).float())):
        v = noise_map(3, 4, 6, 6).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = lsmm(v)
        results.append((out, *torch.autograd.grad(out.sum(), (v, *lsmm.parameters()))))
    assert results[1][0].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("needed", (True, False))
def test_linear_chain(needed: bool) -> None:
    norm, shift = randomised(ChannelLayerNorm(3)), noise(5, seed=3).requires_grad_()
    first, second = randomised(PointwiseLinear(3, 5)), randomised(PointwiseLinear(5, 2, bias=False))
    x = noise_map(5, 3, 4, 4).requires_grad_(needed)
    links = [ChainLink(first, norm, [norm]), ChainLink(second, torch.tanh, shift=shift)]
    weights = (*norm.parameters(), *first.parameters(), *second.parameters(), shift)

    def plain() -> Tensor:
        return second(torch.tanh(first(norm(x))) + shift.view(1, -1, 1, 1))

    assert_same(lambda: linear_chain.linear_chain(x, links), plain, *([x] if needed else []), *weights)


def test_linear_chain_without_gradients_and_with_frozen_parts() -> None:
    norm, linear = randomised(ChannelLayerNorm(3)), randomised(PointwiseLinear(3, 5))
    x = noise_map(2, 3, 4, 4)
    fast = partial(linear_chain.linear_chain, x, [ChainLink(linear, norm, [norm])])
    with torch.no_grad():
        torch.testing.assert_close(fast(), linear(norm(x)))
    norm.requires_grad_(False)
    assert_same(fast, lambda: linear(norm(x)), linear.weight, linear.bias)
    linear.weight.requires_grad_(False)
    assert_same(fast, lambda: linear(norm(x)), linear.bias)


@pytest.mark.parametrize("rate", (0.0, 0.25, 0.999))  # the last drops every sample
def test_dropped_samples_skip_the_branch(rate: float) -> None:
    x = noise_map(16, 2, 3, 3).requires_grad_()
    drop, sizes = timm.layers.DropPath(rate).train(), []

    def branch(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.square()

    results = []
    for add in (lambda: add_residual(x, branch(x), drop), lambda: add_residual_of_kept(x, branch, drop)):
        torch.manual_seed(0)
        out = add()
        assert out.is_contiguous(memory_format=torch.channels_last)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(results[0], results[1])
    kept = int((results[0][0] != x).flatten(1).any(dim=1).sum())
    assert sizes == [16, kept or 16]


@pytest.mark.parametrize("drop_path_rate", (0.0, 0.2))
def test_network_both_ways(drop_path_rate: float) -> None:
    plain, fast = (golden_model("nano80", drop_path_rate=drop_path_rate).double() for _ in range(2))
    x = images("nano80", 6).double()
    torch.manual_seed(0)
    expected = training_step(plain, x)
    torch.manual_seed(0)
    torch.testing.assert_close(training_step(accelerate(fast), x), expected)
    for (name, p), q in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12, msg=name)
    for (name, p), q in zip(fast.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_acceleration_is_only_a_change_of_class() -> None:
    plain = tiny_network()
    fast = accelerate(copy.deepcopy(plain))
    assert list(fast.state_dict()) == list(plain.state_dict())
    pairs = [(type(f), type(p)) for f, p in zip(fast.modules(), plain.modules(), strict=True)]
    assert all(f is p or (f.__base__ is p and f.__name__ == f"Fast{p.__name__}") for f, p in pairs)
    assert sum(f is not p for f, p in pairs) == 4 * 9  # per block: 2 mixing blocks, CGSMM, LSMM, 4 depthwise, itself
    kinds = list(map(type, fast.modules()))
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(fast), accelerate(fast), torch.load(buffer, weights_only=False))
    assert all(list(map(type, other.modules())) == kinds for other in copies)
    baseline = timm.create_model("resnet18", num_classes=3)
    assert list(map(type, accelerate(baseline).modules())) == list(map(type, copy.deepcopy(baseline).modules()))


def test_a_class_derived_from_ours_is_left_alone() -> None:
    class Negated(LSMM):
        def forward(self, v: Tensor) -> Tensor:
            return -super().forward(v)

    block, x = randomised(StripMLPBlock(8, 4, 2)), noise_map(2, 8, 4, 4)
    negated = Negated(4).double()
    negated.load_state_dict(block.strip_mixing.lsmm.state_dict())
    block.strip_mixing.lsmm = negated
    expected = block(x)
    torch.testing.assert_close(accelerate(block)(x), expected)
    assert type(negated) is Negated


def fast_block() -> tuple[StripMLPBlock, Tensor]:
    return accelerate(randomised(StripMLPBlock(4, 4, 2))), noise_map(2, 4, 4, 4).requires_grad_()


def test_differentiating_twice_takes_the_plain_form() -> None:
    def penalty(block: nn.Module) -> Tensor:
        (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    block, x = fast_block()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        penalty(block).backward()
    penalty(randomised(StripMLPBlock(4, 4, 2))).backward()
    assert x.grad.abs().sum() > 0


def test_backward_twice_over_a_kept_graph() -> None:
    block, x = fast_block()
    loss = block(x).square().sum()
    first = torch.autograd.grad(loss, [x, *block.parameters()], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [x, *block.parameters()]), first)


def test_parameters_replaced_between_forward_and_backward() -> None:
    block, x = fast_block()
    others = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    loss = torch.func.functional_call(block, others, (x,)).square().sum()
    with pytest.raises(RuntimeError, match=r"without models\.fast\.accelerate"):
        loss.backward()


def test_replaced_modules_are_called() -> None:
    class Doubled(PointwiseLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block, x = fast_block()
    before = block.channel_mixing(x)
    doubled = Doubled(12, 4).double()
    doubled.load_state_dict(block.channel_mixing.fc2.state_dict())
    block.channel_mixing.fc2 = doubled
    torch.testing.assert_close(block.channel_mixing(x), 2 * before)


def test_hooks_are_called_once() -> None:
    block, x = fast_block()
    calls: list[str] = []
    for name, module in block.named_modules():
        if name != "drop_path":  # its rate is 0
            module.register_forward_hook(lambda _module, _inputs, _output, name=name: calls.append(name))
    block(x).sum().backward()
    assert sorted(calls) == sorted(name for name, _ in block.named_modules() if name != "drop_path")


@pytest.mark.parametrize("name", ("channel_mixing.grn", "strip_mixing.norm1", "strip_mixing.lsmm.reweight2"))
def test_backward_hooks_are_called(name: str) -> None:
    block, x = fast_block()
    calls = []
    block.get_submodule(name).register_full_backward_hook(lambda *_: calls.append(name))
    block(x).sum().backward()
    assert calls == [name]


def test_main_trains_and_evaluates_the_accelerated_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the averaged weights, which are a copy of the network."""
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    forward = FastStripMLPBlock.forward

    def watched(block: FastStripMLPBlock, x: Tensor) -> Tensor:
        seen[block.training].add(id(block))
        return forward(block, x)

    monkeypatch.setattr(FastStripMLPBlock, "forward", watched)
    TinyRun(tmp_path).train("--opts", "TRAIN.EPOCHS", "1", "TRAIN.EMA_DECAY", "0.9")
    assert len(seen[True]) == len(seen[False]) == 4
    assert not seen[True] & seen[False]  # what is evaluated is the copy


def test_synchronised_batch_norm_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = accelerate(golden_model("nano32")), images("nano32", 4)
    expected = training_step(model, x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(accelerate(golden_model("nano32")))
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
    model = tiny_network(**arguments)
    assert kept_bytes(model, x) < reference
    assert kept_bytes(accelerate(model), x) < 0.55 * reference


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", ("accelerated", "plain", "inference"))
def test_autocast_makes_no_float32_maps(dtype: torch.dtype, form: str) -> None:
    """Every map is in half precision; only norms over space, one value per channel, may be float32."""
    model, x = golden_model("nano32", drop_path_rate=0.2), images("nano32", 4)
    model = {"plain": lambda: model, "accelerated": lambda: accelerate(model), "inference": model.to_inference}[form]()
    seen: list[tuple[str, torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor) and t.dim() >= 4 and t.shape[0] in (3, 4) and min(t.shape[-2:]) > 1:
                    seen.append((str(func), t.dtype))
            return out

    with Watch(), torch.autocast("cpu", dtype):
        model(x)
    wrong = [name for name, found in seen[1:] if found != dtype and "_to_copy" not in name]
    assert not wrong
    assert sum(found != dtype for _, found in seen) <= 1  # the images before their cast


@pytest.mark.parametrize("dtype", HALF)
def test_training_under_autocast_is_close(dtype: torch.dtype) -> None:
    x, networks = images("nano32", 4), [golden_model("nano32") for _ in range(3)]
    accelerate(networks[1])
    losses = []
    for network, half in zip(networks, (False, True, True), strict=True):
        with torch.autocast("cpu", dtype, enabled=half):
            loss = soft_cross_entropy(network(x).float())
        (loss * 1024).backward()
        losses.append(loss.item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=2e-2)
    exact, fast, plain = networks
    gradients = zip(exact.named_parameters(), fast.parameters(), plain.parameters(), strict=True)
    for (name, exact), half, plain in gradients:
        assert half.grad.dtype == torch.float32
        size = exact.grad.norm()
        if size > 1e-2:  # no more off than PyTorch's own operations are
            allowed = max(0.05 * size, 2 * (plain.grad - exact.grad).norm())
            assert (half.grad - exact.grad).norm() <= allowed, name
