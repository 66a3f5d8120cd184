"""Each layer against the formula of the paper or of its definition, written as slow loops."""

from collections.abc import Callable

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor

from models.blocks import LSMM, ChannelMixingBlock, RelativePosition, StripMixingBlock, StripMLPBlock, StripMLPLayer
from models.layers import (
    GRN,
    ChannelLayerNorm,
    PointwiseLinear,
    add_residual,
    checkpointed,
    drop_path_rates,
)
from models.strip_mlp import image_sides
from tests.builders import noise, randomised


def strip_mlp_by_loops(layer: StripMLPLayer, x: Tensor) -> Tensor:
    """The formula of the Strip MLP layer; rows as written, columns by exchanging the two axes."""
    if layer.axis == "column":
        return _rows_by_loops(layer, x.transpose(2, 3)).transpose(2, 3)
    return _rows_by_loops(layer, x)


def _rows_by_loops(layer: StripMLPLayer, x: Tensor) -> Tensor:
    batch, dim, height, width = x.shape
    group = dim // layer.num_patches
    weight, bias = layer.mix.weight, layer.mix.bias
    out = torch.zeros_like(x)
    for n in range(batch):
        for d in range(dim):
            g = d % group
            for h in range(height):
                for w_out in range(width):
                    total = bias[g * width + w_out].clone()
                    for e in (-1, 0, 1):
                        if 0 <= h + e < height:
                            for w in range(width):
                                total += weight[g * width + w_out, w, 0, e + 1] * x[n, d, h + e, w]
                    out[n, d, h, w_out] = total
    return out


@pytest.mark.parametrize("axis", ("row", "column"))
@pytest.mark.parametrize(("dim", "num_patches"), ((6, 2), (4, 4), (3, 1)))
def test_strip_mlp_layer(axis: str, dim: int, num_patches: int) -> None:
    layer = randomised(StripMLPLayer(dim, 4, num_patches, axis))
    x = noise(2, dim, 4, 4)
    with torch.no_grad():
        expected = strip_mlp_by_loops(layer, x)
        for maps in (x, x.contiguous(memory_format=torch.channels_last)):
            out = layer(maps).flatten(3).permute(0, 3, 1, 2)  # (B, H, W, P, G) -> (B, H, W, D) -> (B, D, H, W)
            torch.testing.assert_close(out, expected)


def test_relative_position() -> None:
    position = randomised(RelativePosition(3, 5))
    pos = position.position_map()
    for d in range(3):
        for h in range(5):
            for w in range(5):
                assert pos[d, h, w] == position.table[w - h + 5, d]


def test_lsmm_weights_its_three_branches() -> None:
    lsmm = randomised(LSMM(4))
    v = noise(2, 4, 5, 5)
    s, t = lsmm.tall(v), lsmm.wide(v)
    assert lsmm.tall.kernel_size == (7, 3)
    assert lsmm.wide.kernel_size == (3, 7)
    pooled = (s + t + v).mean(dim=(2, 3), keepdim=True)
    z = lsmm.reweight2(torch.nn.functional.gelu(lsmm.reweight1(pooled)))
    out = lsmm(v)
    for n in range(2):
        for d in range(4):
            weights = z[n, 3 * d : 3 * d + 3, 0, 0].softmax(dim=0)
            expected = weights[0] * s[n, d] + weights[1] * t[n, d] + weights[2] * v[n, d]
            torch.testing.assert_close(out[n, d], expected)


def test_grn() -> None:
    grn = randomised(GRN(3))
    y = noise(2, 3, 4, 4)
    out = grn(y)
    for n in range(2):
        norms = [y[n, k].square().sum().sqrt() for k in range(3)]
        mean = sum(norms) / 3
        for k in range(3):
            response = norms[k] / (mean + 1e-6)
            expected = grn.gamma[0, 0, 0, k] * y[n, k] * response + grn.beta[0, 0, 0, k] + y[n, k]
            torch.testing.assert_close(out[n, k], expected)


def test_grn_of_zeros_has_finite_gradients() -> None:
    grn = randomised(GRN(3))
    y = torch.zeros(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    grn(y).sum().backward()
    assert torch.isfinite(y.grad).all()
    assert torch.isfinite(grn.gamma.grad).all()


def test_grn_norm_survives_float16() -> None:
    y = torch.full((1, 2, 16, 16), 6000.0, dtype=torch.float16)  # the norm, 96000, exceeds float16
    grn = GRN(2)
    torch.nn.init.ones_(grn.gamma)
    out = grn(y)
    assert out.dtype == torch.float16 or out.dtype == torch.float32
    torch.testing.assert_close(out.float(), torch.full((1, 2, 16, 16), 12000.0), rtol=1e-3, atol=0)


def test_pointwise_layers() -> None:
    x = noise(2, 4, 3, 3)
    linear, norm = randomised(PointwiseLinear(4, 5)), randomised(ChannelLayerNorm(4))
    last = x.permute(0, 2, 3, 1)
    expected = torch.nn.functional.linear(last, linear.weight, linear.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(linear(x), expected)
    expected = torch.nn.functional.layer_norm(last, (4,), norm.weight, norm.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), expected)


def test_add_residual_draws_one_mask_per_sample() -> None:
    x, branch = noise(64, 2, 3, 3), noise(64, 2, 3, 3, seed=2)
    drop = DropPath(0.25).train()
    torch.manual_seed(0)
    out = add_residual(x, branch, drop)
    torch.manual_seed(0)
    torch.testing.assert_close(out, x + drop(branch))
    dropped = (out == x).flatten(1).all(dim=1)
    assert 0 < dropped.sum() < 64
    torch.testing.assert_close(out[~dropped], x[~dropped] + branch[~dropped] / 0.75)
    torch.testing.assert_close(add_residual(x, branch, drop.eval()), x + branch)


def test_block_draws_token_mask_then_channel_mask() -> None:
    block = randomised(StripMLPBlock(4, 4, 2, drop_path=0.5)).train()
    x = noise(8, 4, 4, 4)
    torch.manual_seed(3)
    out = block(x)
    torch.manual_seed(3)
    mid = x + block.drop_path(block.strip_mixing(x))
    torch.testing.assert_close(out, mid + block.drop_path(block.channel_mixing(mid)))


def test_checkpointed_block_keeps_statistics_and_random_numbers() -> None:
    plain, saving = (randomised(StripMLPBlock(4, 4, 2, drop_path=0.5)).train() for _ in range(2))
    x = noise(8, 4, 4, 4)
    torch.manual_seed(5)
    plain(x).square().sum().backward()
    torch.manual_seed(5)
    checkpointed(saving, x).square().sum().backward()
    for (name, expected), parameter in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
    for (name, expected), buffer in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)
    assert all(m.track_running_stats for m in saving.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_channel_mixing_ratio_sets_the_hidden_width() -> None:
    assert StripMLPBlock(8, 4, 2, mlp_ratio=2.5).channel_mixing.fc1.out_features == 20
    assert ChannelMixingBlock(8, 20)(torch.zeros(1, 8, 4, 4)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: StripMLPLayer(10, 4, 4, "row"), "10 channels.*4 patches"),
        (lambda: StripMLPLayer(8, 4, 4, "diagonal"), "diagonal"),
        (lambda: StripMixingBlock(7, 4, 2), "7 channels"),
        (lambda: drop_path_rates(1.5, 4, "constant"), "1.5"),
        (lambda: drop_path_rates(0.5, 4, "cubic"), "cubic"),
        (lambda: image_sides(100, 32), "100.*32.*96"),
        (lambda: image_sides((64, 40), 32), r"\(64, 40\).*32.*\(64, 32\)"),
    ),
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_drop_path_schedules() -> None:
    assert drop_path_rates(0.3, 3, "constant") == [0.3, 0.3, 0.3]
    assert drop_path_rates(0.3, 4, "linear") == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1, "linear") == [0.0]
