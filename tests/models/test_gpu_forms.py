"""The forms for GPUs: the same functions, tried on the CPU, which is told to take their path."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from models import gpu_path
from models.blocks import RelativePosition, StripMLPBlock, StripMLPLayer
from models.fast import accelerate, ops
from models.fast.blocks import FastGRN, FastRelativePosition
from models.fast.gpu import CastingStripMLPBlock, ProductStripMLPLayer, SquareDepthwiseConv2d
from models.layers import GRN, DepthwiseConv2d
from tests.builders import noise_map, randomised, tiny_network
from tests.golden.load import golden_model, images, training_step


@pytest.fixture(autouse=True)
def _gpu_path() -> Iterator[None]:
    with gpu_path():
        yield


@pytest.mark.parametrize("axis", ("row", "column"))
@pytest.mark.parametrize(
    ("size", "strip_width"),
    # up to 16: one window of the whole map; 17: windows of one row
    ((1, 3), (7, 3), (14, 3), (14, 5), (17, 3), (17, 5), (20, 3), (20, 7), (24, 1)),
)
def test_a_strip_layer_as_a_product(size: int, strip_width: int, axis: str) -> None:
    layer = randomised(StripMLPLayer(4, size, 2, axis, strip_width=strip_width))
    other = size + 4  # rows and columns may differ
    x = noise_map(2, 4, *((other, size) if axis == "row" else (size, other))).requires_grad_()
    product = copy.copy(layer)  # shares the parameters
    product.__class__ = ProductStripMLPLayer
    results = []
    for call in (layer, product.product):
        out = call(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kernel_size", ((7, 3), (3, 7), (3, 3)))
def test_a_square_depthwise_kernel(kernel_size: tuple[int, int]) -> None:
    conv, x = randomised(DepthwiseConv2d(3, kernel_size)), noise_map(2, 3, 5, 6)
    square = copy.copy(conv)
    square.__class__ = SquareDepthwiseConv2d
    with torch.no_grad():
        torch.testing.assert_close(square(x), conv(x), rtol=1e-12, atol=1e-12)
    assert square.weight.shape[2:] == kernel_size


@pytest.mark.parametrize("lean", (False, True))
def test_gradients_in_compiled_and_eager_code(lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code takes other forms than eager code; in float64 each gradient is that of the plain network."""
    results = []
    for form in ("plain", "eager", "compiled"):
        model = golden_model("nano32").double()
        if form != "plain":
            accelerate(model, "cuda", lean=lean)
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda form=form: form == "compiled")
        training_step(model, images("nano32", 3).double())
        results.append([p.grad for p in model.parameters()])
    for gradients in results[1:]:
        torch.testing.assert_close(gradients, results[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("lean", (False, True))
def test_gradients_have_the_strides_of_their_weights(lean: bool) -> None:
    """So that they need not be copied before they are reduced."""
    model = accelerate(tiny_network(), "cuda", lean=lean)
    convert_conv2d_weight_memory_format(model, torch.channels_last)  # as the distributed wrapper does
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    other = [name for name, p in model.named_parameters() if p.grad.stride() != p.stride()]
    assert not other


@pytest.mark.parametrize("compiles", (False, True))
def test_casting_at_once_is_what_autocast_does(compiles: bool) -> None:
    """Outputs and gradients to the bit, and afterwards the parameters themselves are back in their places."""
    results = []
    for form in (StripMLPBlock, CastingStripMLPBlock):
        block = randomised(StripMLPBlock(8, 4, 2)).float()
        block.__class__ = form
        if compiles:
            block.compile(backend="aot_eager", fullgraph=True)
        block.strip_mixing.lsmm.reweight2.bias.requires_grad_(False)
        names = {name: id(p) for name, p in (*block.named_parameters(), *block.named_buffers())}
        with torch.autocast("cpu", torch.bfloat16):
            out = block(noise_map(2, 8, 4, 4).float().requires_grad_())
        out.float().square().sum().backward()
        assert names == {name: id(p) for name, p in (*block.named_parameters(), *block.named_buffers())}
        results.append([out, *(p.grad for p in block.parameters() if p.requires_grad), *block.buffers()])
    assert all(map(torch.equal, *results))


def test_grn_with_a_channel_that_is_zero_everywhere() -> None:
    """There the norm has no derivative; in float16, dividing by it would overflow."""
    grn, a = randomised(GRN(6)), noise_map(3, 6, 4, 4)
    a[:, 1] = 0.0
    fast, a = copy.copy(grn), a.requires_grad_()  # shares the parameters
    fast.__class__ = FastGRN
    results = []
    for call in (grn, fast):
        out = call(a)
        results.append((out, *torch.autograd.grad(out.square().sum(), (a, *grn.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-11)
    fast, half = FastGRN(6), a.detach().half().requires_grad_()
    torch.nn.init.normal_(fast.gamma)
    fast(half).backward(torch.full_like(half, 1024.0))
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("size", ((1, 1), (3, 5), (5, 3)))
def test_position_tables(size: tuple[int, int]) -> None:
    position, x = randomised(RelativePosition(4, size)), noise_map(2, 4, *size).requires_grad_()
    fast = copy.copy(position)  # shares the table
    fast.__class__ = FastRelativePosition
    results = []
    for call in (position, fast):
        out = call(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, position.table))))
    assert torch.equal(results[1][0], results[0][0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_position_tables_of_another_size() -> None:
    position = FastRelativePosition(4, (3, 5))
    with pytest.raises(RuntimeError, match="must match the size"):
        position(torch.zeros(2, 4, 5, 3))


def test_position_tables_sum_half_precision_in_float32() -> None:
    position = FastRelativePosition(2, (3, 3))
    grad = torch.full((512, 2, 3, 3), 1.0)
    grad[0] = 512.0  # in bfloat16, 512 + 1 is 512
    position(torch.zeros(512, 2, 3, 3, dtype=torch.bfloat16)).backward(grad.bfloat16())
    assert position.table.grad[3].tolist() == [3 * 1023.0] * 2


def test_batches_are_counted_once() -> None:
    """By one kernel for the BatchNorms of a block, and only for those that are trained and have a momentum."""
    block = accelerate(StripMLPBlock(8, 4, 2), "cuda", lean=False)
    mixing, calls = block.strip_mixing, []
    mixing.norm2.eval()
    x = torch.randn(2, 8, 4, 4).requires_grad_()
    with CallsOf(torch.ops.aten._foreach_add_.Scalar, calls):
        block(x).sum().backward()
        block(x)
    norms = mixing.norm1, mixing.norm2, mixing.cgsmm.norm
    assert [norm.num_batches_tracked.item() for norm in norms] == [2, 0, 2]
    assert calls == [2, 2]
    mixing.norm1.momentum = None  # its running mean needs the count
    block(x)
    assert [norm.num_batches_tracked.item() for norm in norms] == [3, 0, 3]


class CallsOf(TorchDispatchMode):
    """Notes for each call of an operation the number of tensors in its first argument."""

    def __init__(self, operation: Callable, calls: list[int]) -> None:
        super().__init__()
        self._operation, self._calls = operation, calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self._operation:
            self._calls.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lean", (False, True))
def test_activation_checkpointing_under_autocast(lean: bool) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = accelerate(tiny_network(), "cuda", lean=lean)
        network.set_grad_checkpointing(checkpointing)
        with torch.autocast("cpu", torch.bfloat16):
            out = network(torch.randn(2, 3, 32, 32))
        out.float().square().sum().backward()
        results.append([p.grad for p in network.parameters()])
    assert all(map(torch.equal, *results))


def test_only_the_forms_of_the_device_are_attached() -> None:
    def kinds(*args: str, **options: bool) -> set[str]:
        names = {type(module).__name__ for module in accelerate(tiny_network(), *args, **options).modules()}
        return {name for name in names if name.startswith(("Fast", "Square", "Product", "Casting"))}

    gpu = {"SquareDepthwiseConv2d", "ProductStripMLPLayer", "CastingStripMLPBlock", "FastRelativePosition"}
    assert kinds("cuda", lean=False) == gpu | {"FastGRN", "FastLSMM"}
    assert "FastDepthwiseConv2d" not in kinds("cuda", lean=True) > gpu
    assert kinds("cpu", lean=False) == set()
    assert "FastDepthwiseConv2d" in kinds("cpu", lean=True)


def test_the_inference_form_prepares_its_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = tiny_network().eval(), torch.randn(2, 3, 32, 32)
    folded, padded = network.to_inference(), []
    monkeypatch.setattr(ops.F, "pad", lambda *args, pad=ops.F.pad: padded.append(args) or pad(*args))
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)
        first = len(padded)
        half = [folded(x) for _ in range(2) if torch.is_autocast_enabled("cpu") is False]
        assert torch.equal(*half)
        later = len(padded)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(folded(x).float(), network(x).float(), rtol=0.1, atol=0.05)
        folded.stages[0][0].lsmm.tall.weight.mul_(2.0)
        changed = folded(x)
    assert later - first < 2 * first
    assert not torch.equal(changed, half[0])


@pytest.mark.parametrize(("mode", "marks"), (("default", 0), ("reduce-overhead", 2)))
def test_cuda_graphs_begin_with_each_forward_pass(mode: str, marks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, made = tiny_network(), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **options: None)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: made.append(None))
    network.compile_blocks(mode=mode)
    network = copy.deepcopy(network)  # as an average of the weights is
    for _ in range(2):
        network(torch.randn(2, 3, 32, 32))
    assert len(made) == marks
