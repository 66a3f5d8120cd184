"""Feature maps of images of any size, as dense tasks take them."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from models import DenseBackbone, with_pyramid
from models.features import window_starts
from models.strip_mlp import StripMLPFeatures
from tests.builders import TINY

SIZES = ((32, 32), (32, 64), (45, 67), (96, 33))
SMALL = TINY | {"img_size": 64}


def body(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("strip_mlp_tiny", features_only=True, **(SMALL | options)).eval()


class Reduced(nn.Module):
    """Two maps that are means of the image's pixels, in place of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = timm.models.FeatureInfo(
            [{"num_chs": 3, "reduction": r, "module": ""} for r in (4, 8)], out_indices=(0, 1)
        )
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        assert x.shape[2:] == (32, 32)
        self.batches.append(len(x))
        return [nn.functional.avg_pool2d(x, reduction) for reduction in (4, 8)]


@pytest.mark.parametrize("mode", ("window", "resize"))
@pytest.mark.parametrize("size", SIZES)
def test_constant_stays_constant(mode: str, size: tuple[int, int]) -> None:
    maps = DenseBackbone(Reduced(), 32, mode=mode)(torch.full((2, 3, *size), 0.7))
    assert list(maps) == ["0", "1"]
    for m, reduction in zip(maps.values(), (4, 8), strict=True):
        assert m.shape == (2, 3, *(-(-side // reduction) for side in size))
        torch.testing.assert_close(m, torch.full_like(m, 0.7))


@pytest.mark.parametrize("overlap", (0.0, 0.25, 0.5, 0.9))
def test_windows_agree_with_what_knows_no_borders(overlap: float) -> None:
    """Means over cells do not depend on the window, so blending must give those of the whole image."""
    x = torch.randn(2, 3, 72, 104, dtype=torch.float64)
    stub = Reduced()
    maps = DenseBackbone(stub, 32, overlap=overlap)(x)
    for m, reduction in zip(maps.values(), (4, 8), strict=True):
        torch.testing.assert_close(m, nn.functional.avg_pool2d(x, reduction))
    assert len(stub.batches) == 1  # all windows in one batch


@pytest.mark.parametrize("mode", ("window", "resize"))
def test_an_image_of_one_window_gets_the_maps_of_the_network(mode: str) -> None:
    x = torch.randn(2, 3, 64, 64)
    network = body()
    maps = DenseBackbone(network, mode=mode)(x)
    assert all(map(torch.equal, maps.values(), network(x)))


def test_a_network_for_rectangles() -> None:
    maps = DenseBackbone(body(img_size=(64, 96), out_indices=(1, 2)))(torch.randn(1, 3, 100, 96))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 16, 13, 12), (1, 32, 7, 6)]


def test_the_size_of_feature_maps_can_be_set() -> None:
    network = body()
    network.model.set_input_size((64, 96))
    assert [tuple(m.shape[2:]) for m in network(torch.randn(1, 3, 64, 96))] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert DenseBackbone(network).input_size == (64, 96)


@pytest.mark.parametrize(("side", "overlap"), ((64, 0.25), (96, 0.0), (448, 0.25), (800, 0.5), (1024, 0.9)))
def test_windows_cover_the_image(side: int, overlap: float) -> None:
    starts = window_starts(side, 64, 16, overlap)
    assert starts[0] == 0
    assert starts[-1] == side - 64
    steps = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    assert all(0 < step <= max(16, 64 * (1 - overlap)) for step in steps)
    assert all(start % 16 == 0 for start in starts)


def test_gradients_reach_every_parameter() -> None:
    model = DenseBackbone(body(out_indices=(0, 2))).train()
    sum(m.square().sum() for m in model(torch.randn(1, 3, 64, 96)).values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: DenseBackbone(body(), mode="tile"), "mode is 'tile'.*'window', 'resize'"),
        (lambda: DenseBackbone(body(), overlap=1.0), "overlap is 1.0"),
        (lambda: DenseBackbone(body(), 40), r"input_size is \(40, 40\).*32"),
        (lambda: DenseBackbone(body())(torch.zeros(1, 3, 63, 80)), "63 x 80.*smaller.*64 x 64.*resize"),
        (lambda: body(img_size=(64, 32))(torch.zeros(1, 3, 64, 64)), r"\(1, 3, 64, 64\).*\(batch, 3, 64, 32\)"),
    ),
)
def test_wrong_use(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_faster_rcnn_takes_it_with_frozen_batch_norm() -> None:
    network = freeze_batch_norm_2d(body())
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    model = FasterRCNN(with_pyramid(DenseBackbone(network), 16), num_classes=3, min_size=64, max_size=96).train()
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    sum(model([torch.rand(3, 64, 96)], targets).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    found = model.eval()([torch.rand(3, 64, 96)])
    assert found[0].keys() == {"boxes", "labels", "scores"}


def test_what_the_wrappers_of_other_frameworks_do() -> None:
    """mmsegmentation clears attributes, mmpretrain removes the head, smp and transformers ask feature_info."""
    model = body(in_chans=4)
    for attribute in ("global_pool", "fc", "classifier"):
        setattr(model, attribute, None)
    assert [m.shape[1] for m in model(torch.zeros(1, 4, 64, 64))] == [8, 16, 32, 64]
    info = model.feature_info
    assert [entry["module"] for entry in info.get_dicts()] == info.module_name() == [f"stages.{i}" for i in range(4)]
    assert [entry["num_chs"] for entry in info.get_dicts(keys=["num_chs"])] == info.channels()
    assert tuple(info.out_indices) == (0, 1, 2, 3)
    assert isinstance(model, StripMLPFeatures)
    whole = timm.create_model("strip_mlp_tiny", features_only=False, pretrained=False, checkpoint_path="", **SMALL)
    whole.reset_classifier(0, "")
    assert whole(torch.zeros(2, 3, 64, 64)).shape == (2, 64, 2, 2)


def test_dense_backbone_refuses_a_classifier() -> None:
    with pytest.raises(TypeError, match="features_only=True"):
        DenseBackbone(timm.create_model("resnet10t"))
