"""Weights of one image size turned into weights of another, and stems adapted to other channels."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from models import StripMLPNet, accelerate, fit_weights, from_published, to_published
from models.blocks import CGSMM, RelativePosition, StripMLPLayer
from models.resample import resample_mixing, resample_table, resample_weights, resize_matrix, set_map_size
from tests.builders import noise, randomised, tiny_network

# Sizes of images in pixels, from 224. With patches of 4 pixels and a stride of 8 after them, the last maps have 1 / 32
# of the side; a network with patches of 1 pixel has the same maps for images of a quarter of the side.
OTHERS = ((160, 160), (192, 192), (256, 256), (288, 288), (384, 384), (256, 320))
NATIVE = (224, 224)
other_sizes = pytest.mark.parametrize("size", OTHERS, ids=lambda size: f"{size[0]}x{size[1]}")


def quarter(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // 4, size[1] // 4


def small_network(size: tuple[int, int] = NATIVE, **changes: object) -> StripMLPNet:
    """A tiny network with the maps of the published ones at this size, in evaluation mode."""
    return tiny_network(img_size=quarter(size), patch_size=1, **changes).eval()


def stage_maps(size: tuple[int, int]) -> list[tuple[int, int]]:
    return [(size[0] // reduction, size[1] // reduction) for reduction in (4, 8, 16, 32)]


def resized_layer(axis: str, old: int, new: int) -> tuple[StripMLPLayer, StripMLPLayer]:
    """A Strip MLP layer and the same for rows, or columns, of another length."""
    layer, other = (randomised(StripMLPLayer(6, size, 2, axis)) for size in (old, new))
    weight, bias = resample_mixing(layer.mix.weight, layer.mix.bias, new)
    other.mix.load_state_dict({"weight": weight, "bias": bias})
    return layer, other


def outputs(layer: StripMLPLayer, x: Tensor) -> Tensor:
    """The layer's output with the mixed axis last, (B, D, other axis, mixed axis)."""
    y = layer(x if layer.axis == "row" else x.transpose(2, 3)).flatten(3).permute(0, 3, 1, 2)
    return y if layer.axis == "row" else y.transpose(2, 3)


@torch.no_grad()
@other_sizes
@pytest.mark.parametrize("axis", ("row", "column"))
def test_mixing_is_exact_on_upsampled_rows_and_on_constant_ones(size: tuple[int, int], axis: str) -> None:
    for old_map, new_map in zip(stage_maps(NATIVE), stage_maps(size), strict=True):
        index = 1 if axis == "row" else 0
        old, new = old_map[index], new_map[index]
        layer, other = resized_layer(axis, old, new)
        rows = noise(2, 6, 3, old if new > old else 1).expand(2, 6, 3, old)
        matrix = resize_matrix(old, new)
        torch.testing.assert_close(outputs(other, rows @ matrix.T), outputs(layer, rows) @ matrix.T)


@other_sizes
def test_tables_of_squares_are_interpolated_and_of_rectangles_averaged(size: tuple[int, int]) -> None:
    old, new = (stage_maps(s)[3] for s in (NATIVE, size))
    table = noise(sum(old) + 1, 3)
    total, count = torch.zeros(sum(new) - 1, 3, dtype=torch.float64), torch.zeros(sum(new) - 1, 1, dtype=torch.float64)
    for h in range(new[0]):
        for w in range(new[1]):
            place = w * (old[1] - 1) / (new[1] - 1) - h * (old[0] - 1) / (new[0] - 1) + old[0]
            row = w - h + new[0] - 1
            low = int(place + 1e-9)
            total[row] += torch.lerp(table[low], table[low + 1], place - low)
            count[row] += 1
    resampled = resample_table(table, old, new)
    torch.testing.assert_close(resampled[1:-1], total / count)
    assert torch.equal(resampled[[0, -1]], table[[0, -1]])  # which no position reads
    torch.testing.assert_close(resample_table(torch.ones_like(table), old, new), torch.ones_like(resampled))
    if size[0] == size[1]:
        linear = torch.arange(-old[0], old[0] + 1.0, dtype=torch.float64)[:, None]
        expected = torch.linspace(1 - old[0], old[0] - 1, 2 * new[0] - 1, dtype=torch.float64)[:, None]
        torch.testing.assert_close(resample_table(linear, old, new)[1:-1], expected)


def test_position_of_a_rectangle() -> None:
    position = randomised(RelativePosition(2, (3, 5)))
    expected = torch.stack([torch.stack([position.table[w - h + 3] for w in range(5)]) for h in range(3)])
    assert torch.equal(position.position_map(), expected.permute(2, 0, 1))
    assert position.table.shape == (3 + 5 + 1, 2)


def test_a_map_of_one_pixel_becomes_constant() -> None:
    cgsmm = randomised(CGSMM(4, 1, 2)).eval()
    set_map_size(cgsmm, 2, 3)
    assert torch.equal(cgsmm.row_position.table[1:-1], cgsmm.row_position.table[1:2].expand(4, 4))
    assert cgsmm(noise(1, 4, 2, 3)).shape == (1, 4, 2, 3)
    set_map_size(cgsmm, 1, 1)
    assert cgsmm(noise(1, 4, 1, 1)).shape == (1, 4, 1, 1)


def test_the_same_size_changes_nothing_to_the_bit() -> None:
    network = small_network()
    before, parameters = dict(network.state_dict()), list(network.parameters())
    network.set_input_size(quarter(NATIVE))
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert all(value is before[name] for name, value in resample_weights(before, network).items())
    assert fit_weights(before, network) == (before, [])


def randomised_statistics(network: StripMLPNet) -> StripMLPNet:
    """Return the network with other statistics than those of a fresh one, the same each time."""
    torch.manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return network


def onnx_scores(form: nn.Module, images: Tensor, path: Path) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(form, (images,), dynamo=True, optimize=False, verbose=False, input_names=["images"]).save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


@torch.no_grad()
@other_sizes
def test_network_of_another_size(size: tuple[int, int]) -> None:
    network = randomised_statistics(small_network())
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    other = small_network(size)
    other.load_state_dict(fit_weights(weights, other)[0])
    network.set_input_size(quarter(size))
    images = torch.randn(2, 3, *quarter(size))
    expected = other(images)
    assert torch.equal(network(images), expected)
    assert network.img_size == quarter(size)
    torch.testing.assert_close(accelerate(network, torch.device("cpu"))(images), expected)
    torch.testing.assert_close(network.to_inference()(images), expected, rtol=1e-4, atol=1e-5)


def sometimes(size: tuple[int, int]) -> object:
    """Export the rectangular size every time, the others with the long tests."""
    return size if size == (256, 320) else pytest.param(size, marks=pytest.mark.faults)


@torch.no_grad()
@pytest.mark.parametrize("size", list(map(sometimes, OTHERS)), ids=str)
def test_onnx_of_another_size(size: tuple[int, int], tmp_path: Path) -> None:
    network = randomised_statistics(small_network())
    network.set_input_size(quarter(size))
    images = torch.randn(2, 3, *quarter(size))
    scores = onnx_scores(network.to_inference(), images, tmp_path / "network.onnx")
    np.testing.assert_allclose(scores, network(images), rtol=1e-3, atol=1e-4)


@pytest.fixture
def weight_file(tmp_path: Path) -> Path:
    """Weights of a square network for RGB images, under their published names."""
    torch.save({"model": to_published(small_network().state_dict())}, tmp_path / "square.pth")
    return tmp_path / "square.pth"


def pretrained(weight_file: Path, **options: object) -> nn.Module:
    tiny = {"patch_size": 1, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_classes": 3}
    overlay = {"file": str(weight_file), "num_classes": 3}
    return timm.create_model(
        "strip_mlp_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **(tiny | options)
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("in_chans", (1, 3, 4))
def test_timm_creates_other_sizes_and_channels_with_weights(weight_file: Path, in_chans: int) -> None:
    size = quarter((256, 320))
    model = pretrained(weight_file, img_size=size, in_chans=in_chans)
    expected = small_network((256, 320), in_chans=in_chans)
    weights = {name: torch.zeros_like(value) for name, value in small_network().state_dict().items()}
    published = torch.load(weight_file, weights_only=True)["model"]
    weights.update(from_published(published))
    weights, changes = fit_weights(weights, expected)
    assert len(changes) == (1 if in_chans == 3 else 2)
    expected.load_state_dict(weights)
    images = torch.randn(1, in_chans, *size)
    assert torch.equal(model(images), expected(images))
    shapes = [
        tuple(f.shape[2:]) for f in pretrained(weight_file, img_size=size, features_only=True)(torch.zeros(1, 3, *size))
    ]
    assert shapes == stage_maps((256, 320))


def test_timm_knows_the_size_that_was_set(weight_file: Path) -> None:
    model = pretrained(weight_file, img_size=quarter(NATIVE))
    model.set_input_size(quarter((256, 320)))
    if hasattr(timm.models, "get_model_input_config"):  # timm 1.0.31
        assert timm.models.get_model_input_config(model)["input_size"] == (3, 64, 80)
    for wrong in (60, (64, 60)):
        with pytest.raises(ValueError, match="multiple of 8"):
            model.set_input_size(wrong)
    assert model.img_size == (64, 80)


def test_shapes_alone_can_be_resampled() -> None:
    with torch.device("meta"):
        network, other = small_network(), small_network((256, 320))
        network.set_input_size(quarter((256, 320)))
        weights, _ = fit_weights(small_network().state_dict(), other)
    for state in (network.state_dict(), weights):
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in other.state_dict().items()}
        assert all(value.is_meta for value in state.values())


def test_what_set_input_size_keeps() -> None:
    model = tiny_network().double()
    model.stages[0].requires_grad_(False)
    model.set_input_size((64, 32))
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert not any(p.requires_grad for p in model.stages[0].parameters())
    assert all(p.requires_grad for p in model.stages[1].parameters())
    model(noise(2, 3, 64, 32)).sum().backward()
    assert all(p.grad is not None for p in model.stages[1].parameters())


@pytest.mark.parametrize("in_chans", (1, 2, 4, 6))
def test_a_stem_gives_grey_images_the_same_response_whatever_the_channels(in_chans: int) -> None:
    weights, model = tiny_network().state_dict(), tiny_network(in_chans=in_chans)
    fitted, changes = fit_weights(weights, model)
    assert changes == [f"stem patch_embed.weight adapted from 3 to {in_chans} channels"]
    before, after = (w["patch_embed.weight"] for w in (weights, fitted))
    torch.testing.assert_close(after, adapt_input_conv(in_chans, before))
    if in_chans in (1, 6):
        torch.testing.assert_close(after.sum(dim=1), before.sum(dim=1))


def test_the_stem_of_a_timm_model_is_adapted() -> None:
    weights, model = timm.create_model("resnet18").state_dict(), timm.create_model("resnet18", in_chans=4)
    fitted, changes = fit_weights(weights, model)
    assert changes == ["stem conv1.weight adapted from 3 to 4 channels"]
    model.load_state_dict(fitted)
    assert fit_weights(weights, nn.Linear(2, 2)) == (weights, [])


def test_a_stem_of_other_channels_is_left() -> None:
    weights = tiny_network(in_chans=4).state_dict()
    fitted, changes = fit_weights(weights, tiny_network())
    assert fitted["patch_embed.weight"] is weights["patch_embed.weight"]
    assert changes == []


@pytest.mark.parametrize("entry", ("row_mix.mix.weight", "column_mix.mix.bias", "row_position.table"))
def test_blocks_that_do_not_fit_themselves_are_left(entry: str) -> None:
    weights, model = tiny_network().state_dict(), tiny_network(img_size=64)
    name = f"stages.0.0.strip_mixing.cgsmm.{entry}"
    for broken in (weights[name][:-1], weights[name][None], weights[name][:0]):
        given = {**weights, name: broken}
        fitted = resample_weights(given, model)
        assert all(fitted[key] is given[key] for key in given if key.startswith("stages.0."))
