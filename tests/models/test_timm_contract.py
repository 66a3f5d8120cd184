"""What timm promises of every model it makes, and what its wrappers and tests ask of one."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import FeatureInfo, group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from models import accelerate, to_published
from models.strip_mlp import default_cfgs

SMALL = {"img_size": 64, "embed_dim": 16, "depths": (1, 2, 1, 1), "num_classes": 5}
CHANNELS, REDUCTIONS = [16, 32, 64, 128], [4, 8, 16, 32]

pytestmark = pytest.mark.filterwarnings("ignore:The nodes obtained by tracing:UserWarning")


def created(name: str = "strip_mlp_tiny", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL | options)).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=sorted(default_cfgs))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def variant(name: str, **options: Any) -> nn.Module:
    """Return the variant in its own width, but with few blocks and for small images."""
    small = {"img_size": 32, "depths": (1, 1, 1, 1), "num_classes": 5}
    return timm.create_model(name, **(small | options)).eval()


def without_gradient(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.grad is None]


def test_default_cfg_names_parts_of_the_network(name: str) -> None:
    with torch.device("meta"):
        model = variant(name, img_size=224, num_classes=1000)
        features = model.forward_features(torch.empty(1, *model.pretrained_cfg["input_size"]))
    cfg, names = model.pretrained_cfg, model.state_dict().keys()
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert {cfg["classifier"] + ".weight", cfg["first_conv"] + ".weight"} <= names
    assert model.get_classifier().out_features == cfg["num_classes"] == model.num_classes


def test_pooling_and_head(name: str, x: Tensor) -> None:
    x = x[:, :, :32, :32]
    model = variant(name)
    features = model.forward_features(x)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(7, "avg")
    assert (model.num_classes, model(x).shape) == (7, (2, 7))
    model = variant(name, num_classes=0, global_pool="")
    assert model(x).shape == (2, model.num_features, 1, 1)


def test_poolings(x: Tensor) -> None:
    positions = created(global_pool="")
    assert positions(x).shape == (2, 5, 2, 2)
    torch.testing.assert_close(positions(x).mean(dim=(2, 3)), created()(x))
    assert positions.forward_head(positions.forward_features(x), pre_logits=True).shape == (2, 128, 2, 2)
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        positions.reset_classifier(7, "max")
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        created(global_pool="max")


@pytest.mark.parametrize("num_classes", (0, 5))
def test_other_forms_without_pooling(num_classes: int, x: Tensor) -> None:
    model = created(global_pool="", num_classes=num_classes)
    expected = model(x)
    torch.testing.assert_close(model.to_inference()(x), expected)
    torch.testing.assert_close(accelerate(model, torch.device("cpu"))(x), expected)


def test_intermediates(name: str, x: Tensor) -> None:
    x = x[:, :, :32, :32]
    model = variant(name, drop_path_rate=0.0)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    features, maps = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    for m, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert m.shape == (2, channels, 32 // reduction, 32 // reduction)
    assert info.reduction() == REDUCTIONS
    model.train()
    plain = model.forward_intermediates(x, indices=2, intermediates_only=True)
    model.set_grad_checkpointing()
    again = model.forward_intermediates(x, indices=[-1, 2], intermediates_only=True)
    assert all(map(torch.equal, again, plain))


def test_options_of_intermediates(x: Tensor) -> None:
    model = created()
    features, maps = model.forward_intermediates(x)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[3], features)
    assert not torch.equal(maps[3], features)
    called: list[int] = []
    for stage in range(4):
        model.stages[stage].register_forward_hook(lambda *_, stage=stage: called.append(stage))
    last, chosen = model.forward_intermediates(x, indices=[1, 0], stop_early=True)
    assert called == [0, 1]
    assert torch.equal(last, maps[1])
    assert all(map(torch.equal, chosen, maps[:2]))
    with pytest.raises(ValueError, match="'NLC'.*'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("indices", ((4,), -5, 0, 5, (), (0, -5)))
def test_maps_that_are_not_there(indices: Any, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"out_indices\) are .* maps 0 to 3"):
        created(features_only=True, out_indices=indices)
    with pytest.raises(ValueError, match="maps 0 to 3"):
        created().forward_intermediates(x, indices=indices)


@pytest.mark.parametrize("last", range(4))
def test_pruned_to_what_the_maps_need(last: int, x: Tensor) -> None:
    model = created()
    expected = model.forward_intermediates(x, intermediates_only=True)[last]
    assert model.prune_intermediate_layers([last - 4], prune_norm=True) == [last]
    assert torch.equal(model(x), expected)
    assert model.num_features == model.head_hidden_size == CHANNELS[last]
    model.train()(x).sum().backward()
    assert not without_gradient(model)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="pruned"):
        model.to_inference()


def test_pruning_keeps_what_is_asked_for(x: Tensor) -> None:
    model = created()
    scores = model(x)
    assert model.prune_intermediate_layers(1, prune_head=False) == [3]
    assert torch.equal(model(x), scores)


@pytest.mark.parametrize("out_indices", ((0,), (1,), (2,), (3,), (0, 2), (0, 1, 2, 3), (-1, 0), 2))
def test_feature_maps_have_no_unused_parameters(out_indices: Any, x: Tensor) -> None:
    expected = created().forward_intermediates(x, intermediates_only=True)
    model = created(features_only=True, out_indices=out_indices)
    info = model.feature_info
    chosen = [entry["index"] for entry in info.get_dicts()]
    assert info.channels() == [CHANNELS[i] for i in chosen]
    assert info.reduction() == [REDUCTIONS[i] for i in chosen]
    maps = model(x)
    assert len(maps) == len(chosen) == (out_indices if isinstance(out_indices, int) else len(out_indices))
    assert all(map(torch.equal, maps, (expected[i] for i in chosen)))
    sum(m.sum() for m in model.train()(x)).backward()
    assert not without_gradient(model)


def test_gradient_checkpointing_of_feature_maps(x: Tensor) -> None:
    gradients, calls = [], []
    for enable in (False, True):
        model = created(features_only=True, drop_path_rate=0.0).train()
        model.set_grad_checkpointing(enable)
        model.model.stages[0][0].register_forward_pre_hook(lambda *_, enable=enable: calls.append(enable))
        sum(m.square().sum() for m in model(x)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert calls == [False, True, True]  # a checkpointed block runs a second time
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("feature_cls", ("getter", "hook", "fx"))
def test_other_ways_to_the_feature_maps(feature_cls: str, x: Tensor) -> None:
    expected = created(features_only=True, out_indices=(1, 3))(x)
    maps = created(features_only=True, out_indices=(1, 3), feature_cls=feature_cls)(x)
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("feature_cls", ("list", "Dict"))
def test_ways_that_run_parts_in_a_row(feature_cls: str) -> None:
    with pytest.raises(ValueError, match=f"feature_cls is '{feature_cls.lower()}'.*skips"):
        created(features_only=True, feature_cls=feature_cls)


@pytest.mark.parametrize("published", (False, True))
def test_feature_maps_of_a_checkpoint(
    published: bool, x: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = created(num_classes=9)
    weights = whole.state_dict()
    torch.save({"state_dict": to_published(weights) if published else weights}, tmp_path / "whole.pth")
    expected = whole.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    overlay = {"file": str(tmp_path / "whole.pth"), "num_classes": 9}
    for options in (
        {"checkpoint_path": str(tmp_path / "whole.pth")},
        {"pretrained": True, "pretrained_cfg_overlay": overlay},
    ):
        model = created(features_only=True, out_indices=(0, 2), **options)
        assert all(map(torch.equal, model(x), expected))
    again = created(features_only=True, out_indices=(0, 2))
    again.load_state_dict(model.state_dict())
    assert all(map(torch.equal, again(x), expected))
    assert not [record for record in caplog.records if record.name.startswith("models")]
    other = created(
        features_only=True, img_size=(64, 96), in_chans=1, checkpoint_path=str(tmp_path / "whole.pth"), num_classes=2
    )
    assert other(torch.zeros(1, 1, 64, 96))[0].shape == (1, 16, 16, 24)
    assert any("64 x 64 images resampled to 64 x 96" in message for message in caplog.messages)
    assert any("adapted from 3 to 1 channels" in message for message in caplog.messages)


def test_feature_maps_of_a_wrong_checkpoint() -> None:
    model = created(features_only=True, out_indices=(0, 1))
    with pytest.raises(RuntimeError, match="nonsense"):
        model.load_state_dict(created().state_dict() | {"nonsense": torch.zeros(1)})
    weights = created().state_dict()
    del weights["patch_embed.weight"]
    with pytest.raises(RuntimeError, match="patch_embed"):
        model.load_state_dict(weights)


def test_layers_for_layer_decay() -> None:
    model = created(depths=(1, 2, 3, 1))
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    blocks = [f"stages.{stage}.{block}." for stage, depth in enumerate((1, 2, 3, 1)) for block in range(depth)]
    assert {layers["patch_embed.weight"], layers["head.weight"]} == {0, len(blocks) + 1}
    for number, block in enumerate(blocks, start=1):
        assert {layer for parameter, layer in layers.items() if parameter.startswith(block)} == {number}
    inputs = {"merging.0": "1.0", "merging.1": "2.0", "skip_1_to_3": "2.0", "merging.2": "3.0", "skip_1_to_4": "3.0"}
    for part, block in (inputs | {"skip_2_to_4": "3.0"}).items():
        assert layers[f"{part}.weight"] == layers[f"stages.{block}.strip_mixing.norm1.weight"]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(set(coarse.values())) == list(range(6))
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    rates = [scale[id(p)] for name, p in sorted(model.named_parameters(), key=lambda entry: layers[entry[0]])]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.5 ** (len(blocks) + 1), 1.0)


@pytest.mark.parametrize("features_only", (False, True))
def test_device_and_type_at_construction(features_only: bool, x: Tensor) -> None:
    model = created(device="meta", dtype=torch.bfloat16, features_only=features_only)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    model = created(dtype=torch.float64, features_only=features_only)
    for rounded, plain in zip(model.parameters(), created(features_only=features_only).parameters(), strict=True):
        assert torch.equal(rounded, plain.double())
    out = model(x.double())
    assert {m.dtype for m in out} == {torch.float64}


@pytest.mark.parametrize("train", (False, True))
def test_fx_tracing(name: str, train: bool, x: Tensor) -> None:
    x = x[:, :, :32, :32]
    model = variant(name, drop_path_rate=0.5, num_classes=42).train(train)
    traced = torch.fx.symbolic_trace(model)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    out = traced(x)
    assert torch.equal(out, expected)
    out.mean().backward()
    assert out.shape == (2, 42)
    assert not without_gradient(traced)
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\).*\(batch, 3, 32, 32\)"):
        traced(x[:, :, :16, :16])


def test_strict_export_with_any_batch(x: Tensor) -> None:
    model = created(depths=(1, 1, 1, 1))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True)
    torch.testing.assert_close(program.module()(x.repeat(3, 1, 1, 1)), model(x).repeat(3, 1))
