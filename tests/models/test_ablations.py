"""The networks of the ablations: each lacks one thing, and has every other form that the whole network has."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from yacs.config import CfgNode

import hubconf
from models import accelerate, build_model, fit_weights, gpu_path
from models.blocks import LSMM, StripMLPLayer
from tests.builders import config_with, noise, noise_map, randomised, tiny_network
from tools.model_folder import architecture
from tools.strip_maps import draw_positions, draw_strips
from utils.checkpoint import load_weights
from utils.config import parse_config
from utils.errors import CheckpointError

ABLATIONS = {
    "strip_width_1": {"strip_width": 1},
    "strip_width_5": {"strip_width": 5},
    "num_patches": {"num_patches": 1},
    "cgsmm": {"token_mixing": "cgsmm"},
    "lsmm": {"token_mixing": "lsmm"},
    "no_skips": {"stage_skips": False},
    "lsmm_no_skips": {"token_mixing": "lsmm", "stage_skips": False},
    "cgsmm_5_no_skips": {"strip_width": 5, "token_mixing": "cgsmm", "stage_skips": False},
}
every_ablation = pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=ABLATIONS)


def small(ablation: dict[str, Any], **changes: Any) -> nn.Module:
    """Return a tiny network for 64 pixels in float64, every parameter away from its initial value, but not large."""
    model = randomised(tiny_network(**({"img_size": 64, "drop_path_rate": 0.0} | ablation | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model


def config_for(ablation: dict[str, Any], **keys: Any) -> CfgNode:
    """Return the configuration of a tiny network for 32 pixels."""
    tiny = {"EMBED_DIM": 8, "LAYERS": [1, 1, 1, 1]} | {name.upper(): value for name, value in ablation.items()}
    return config_with(
        DATA__IMG_SIZE=32, **{f"MODEL__STRIP_MLP__{name}": value for name, value in tiny.items()}, **keys
    )


@every_ablation
@pytest.mark.parametrize("device_type", ("cpu", "cuda"))
def test_accelerated_training_is_the_same(
    ablation: dict[str, Any], device_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, x = small(ablation, drop_path_rate=0.2), noise(4, 3, 64, 64)
    fast = accelerate(copy.deepcopy(plain), torch.device(device_type), lean="on")
    assert any(type(f) is not type(p) for f, p in zip(fast.modules(), plain.modules(), strict=True))
    results = []
    for model in (plain, fast):
        torch.manual_seed(0)
        if model is fast and device_type == "cuda":  # compiled code takes the GPU's forms
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            with gpu_path():
                out = model(x)
        else:
            out = model(x)
        out.square().sum().backward()
        results.append((out, [parameter.grad for parameter in model.parameters()], list(model.buffers())))
    assert all(grad is not None for grad in results[0][1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)


@every_ablation
def test_inference_form_gives_the_same_scores(ablation: dict[str, Any]) -> None:
    model, x = small(ablation).eval(), noise(3, 3, 64, 64)
    form = model.to_inference()
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(form(x), expected)
        with gpu_path():
            torch.testing.assert_close(form(x), expected)


@pytest.mark.parametrize("strip_width", (1, 3, 5, 7))
@pytest.mark.parametrize("axis", ("row", "column"))
def test_a_strip_is_as_wide_as_it_says(strip_width: int, axis: str) -> None:
    layer, x = randomised(StripMLPLayer(4, 9, 2, axis, strip_width=strip_width)), noise_map(1, 4, 9, 9)
    changed = x.clone()
    (changed[:, :, 4] if axis == "row" else changed[..., 4]).add_(1.0)
    difference = (layer(changed) - layer(x)).abs().sum(dim=(0, 3, 4))  # (B, H, W, P, G) -> (H, W)
    seen = difference.sum(dim=1 if axis == "row" else 0).nonzero().flatten().tolist()
    assert seen == list(range(4 - strip_width // 2, 5 + strip_width // 2))


@pytest.mark.parametrize(("alone", "missing"), (("cgsmm", "lsmm"), ("lsmm", "cgsmm")))
def test_a_module_alone_leaves_the_other_half_as_it_is(alone: str, missing: str) -> None:
    whole, ablated = (small({"token_mixing": mixing}) for mixing in ("both", alone))
    weights = {name: value for name, value in whole.state_dict().items() if f".{missing}." not in name}
    ablated.load_state_dict(weights)  # strict: nothing else differs
    for stage in whole.stages:
        setattr(stage[0].strip_mixing, missing, nn.Identity())
    x = noise(2, 3, 64, 64)
    assert torch.equal(ablated(x), whole(x))


def test_without_skips_is_with_skips_of_zeros() -> None:
    whole, ablated = small({}), small({"stage_skips": False})
    ablated.load_state_dict({name: value for name, value in whole.state_dict().items() if "skip" not in name})
    for skip in (whole.skip_1_to_3, whole.skip_1_to_4, whole.skip_2_to_4):
        nn.init.zeros_(skip.weight)
    x = noise(2, 3, 64, 64)
    assert torch.equal(ablated(x), whole(x))


@every_ablation
def test_another_image_size(ablation: dict[str, Any]) -> None:
    model, other, x = small(ablation).eval(), small(ablation, img_size=(96, 64)).eval(), noise(2, 3, 96, 64)
    other.load_state_dict(fit_weights(model.state_dict(), other)[0])
    model.set_input_size((96, 64))
    assert torch.equal(model(x), other(x))


@every_ablation
def test_export_tracing_and_checkpointing(ablation: dict[str, Any]) -> None:
    model, x = small(ablation), noise(2, 3, 64, 64)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
    torch.manual_seed(0)
    model.set_grad_checkpointing()
    assert torch.equal(model(x), expected)


def test_strict_export() -> None:
    model, x = small(ABLATIONS["lsmm_no_skips"]).eval(), noise(2, 3, 64, 64)
    program = torch.export.export(model, (x,), strict=True)
    torch.testing.assert_close(program.module()(x), model(x))


@every_ablation
def test_layers_and_freezing(ablation: dict[str, Any]) -> None:
    model = build_model(config_for(ablation, TRAIN__FREEZE="stages3"), 3)
    groups = group_parameters(model, model.group_matcher(coarse=True))
    assert len(groups) == 6  # stem, four stages, norm and head
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    trained = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained >= {"merging", "stages", "norm", "head"}
    assert ("skip_1_to_4" in trained) == ablation.get("stage_skips", True)
    assert isinstance(model.stages[0][0].strip_mixing.lsmm, LSMM) == (ablation.get("token_mixing") != "cgsmm")
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@every_ablation
def test_a_folder_for_timm_says_what_is_ablated(ablation: dict[str, Any]) -> None:
    config = config_for(ablation)
    model = build_model(config, 3)
    name, arguments = architecture(SimpleNamespace(model=model, config=config))
    again = timm.create_model(name, **(arguments | {"num_classes": 3}))
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("ablation", [ABLATIONS[name] for name in ("strip_width_5", "cgsmm", "lsmm", "no_skips")])
def test_weights_of_another_ablation_are_refused(ablation: dict[str, Any], tmp_path: Path) -> None:
    pairs = (tiny_network(), tiny_network(**ablation)), (tiny_network(**ablation), tiny_network())
    for number, (theirs, ours) in enumerate(pairs):
        torch.save({"model": theirs.state_dict()}, tmp_path / f"{number}.pth")
        with pytest.raises(CheckpointError, match=r"does not fit the model(.|\n)*MODEL\.\*"):
            load_weights(ours, str(tmp_path / f"{number}.pth"), remap=dict, fit=fit_weights, replace_head=True)


@pytest.mark.parametrize("ablation", [ABLATIONS[name] for name in ("cgsmm", "lsmm", "no_skips")])
def test_feature_maps(ablation: dict[str, Any]) -> None:
    """Of all four stages, and what another ablation has more is refused; what was pruned is left out."""
    options = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1)}
    whole = timm.create_model("strip_mlp_tiny", **options, **ablation)
    maps = timm.create_model("strip_mlp_tiny", features_only=True, out_indices=(0, 2), **options, **ablation)
    maps.load_state_dict(whole.state_dict())
    x = torch.randn(2, 3, 32, 32)
    sum(map(Tensor.sum, maps(x))).backward()
    assert all(parameter.grad is not None for parameter in maps.parameters())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        maps.load_state_dict(timm.create_model("strip_mlp_tiny", **options).state_dict())


def test_entry_points_take_the_arguments() -> None:
    options = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1), "strip_width": 5, "stage_skips": False}
    for model in (timm.create_model("strip_mlp_tiny", **options), hubconf.strip_mlp_base(**options)):
        assert model.stages[0][0].strip_mixing.cgsmm.row_mix.mix.kernel_size == (1, 5)
        assert not [name for name in model.state_dict() if name.startswith("skip")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"strip_width": 4}, "strip_width is 4; it must be odd"),
        ({"strip_width": -1}, "strip_width is -1"),
        ({"token_mixing": "mlp"}, "token_mixing is 'mlp'; known: 'both', 'cgsmm', 'lsmm'"),
    ),
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_network(**arguments)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    (
        ("STRIP_WIDTH", 4, "MODEL.STRIP_MLP.STRIP_WIDTH is 4, .* take 5"),
        ("STRIP_WIDTH", 0, r"MODEL.STRIP_MLP.STRIP_WIDTH is 0; allowed: \[1, 255\]"),
        ("TOKEN_MIXING", "mlp", "MODEL.STRIP_MLP.TOKEN_MIXING: 'mlp' is unknown; known: both, cgsmm, lsmm"),
        ("STAGE_SKIPS", "perhaps", "MODEL.STRIP_MLP.STAGE_SKIPS.*not true or false"),
    ),
)
def test_wrong_keys(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config("", "a test", {f"MODEL.STRIP_MLP.{key}": value})


@pytest.mark.parametrize(("strip_width", "maps"), ((1, 2), (5, 10)))
def test_strips_of_any_width_are_drawn(strip_width: int, maps: int) -> None:
    figure = draw_strips(tiny_network(strip_width=strip_width))
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len(titles) == 4 * maps
    assert any("own row" in title for title in titles)
    assert any("2 columns before" in title.replace("\n", " ") for title in titles) == (strip_width == 5)


def test_no_strips_to_draw() -> None:
    for draw in (draw_strips, draw_positions):
        with pytest.raises(ValueError, match="TOKEN_MIXING is lsmm"):
            draw(tiny_network(token_mixing="lsmm"))
