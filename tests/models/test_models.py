"""The network as its users see it: variants, arguments, errors, timm's interface, memory formats, configs."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import hubconf
from models import StripMLPNet, accelerate, build_model, inference_form
from models.fast.blocks import FastChannelMixingBlock
from models.fast.gpu import CastingStripMLPBlock
from models.strip_mlp import default_cfgs
from tests.builders import model_config, tiny_network
from tests.golden.load import golden_model, images, training_step

NANO = {"img_size": 32, "num_classes": 5, "embed_dim": 16, "depths": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("variant", "parameters", "macs"),
    (
        ("tiny_light", 18_243_920, 2.52),
        ("tiny", 24_903_920, 3.65),
        ("small", 42_568_600, 6.80),
        ("base", 57_216_480, 9.19),
    ),
)
def test_size_of_the_variants(variant: str, parameters: int, macs: float) -> None:
    """Parameters, and multiply-accumulates in G at 224 (half of the counter's FLOPs), as published."""
    with torch.device("meta"):
        model = timm.create_model(f"strip_mlp_{variant}").eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=2e-3)


def test_hub_entry_points_are_the_timm_models() -> None:
    assert set(hubconf.__all__) == set(default_cfgs) == set(timm.list_models(module="strip_mlp"))
    model = hubconf.strip_mlp_tiny_light(**NANO)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_timm_interface() -> None:
    model = timm.create_model("strip_mlp_tiny", drop_rate=0.1, drop_path_rate=0.2, in_chans=1, **NANO)
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["crop_pct"], cfg["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")
    assert isinstance(model.get_submodule(cfg["first_conv"]), torch.nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.head_drop.p == 0.1
    assert model.stages[2][0].drop_path.drop_prob == 0.2
    assert model.no_weight_decay() == set()
    x = torch.randn(2, 1, 32, 32)
    features = model.eval().forward_features(x)
    assert features.shape == (2, model.num_features, 1, 1)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


def test_timm_feature_maps() -> None:
    model = timm.create_model("strip_mlp_tiny", features_only=True, **(NANO | {"img_size": 64}))
    shapes = [tuple(f.shape) for f in model(torch.zeros(2, 3, 64, 64))]
    assert shapes == [(2, 16, 16, 16), (2, 32, 8, 8), (2, 64, 4, 4), (2, 128, 2, 2)]
    assert model.feature_info.reduction() == [4, 8, 16, 32]


def test_arguments_take_effect() -> None:
    model = StripMLPNet(
        **NANO, mlp_ratio=2, num_patches=2, drop_rate=0.5, drop_path_rate=0.3, drop_path_schedule="linear", patch_size=2
    )
    assert model.stages[0][0].channel_mixing.fc1.out_features == 32
    assert model.stages[1][0].strip_mixing.cgsmm.row_mix.num_patches == 2
    assert [stage[0].drop_path.drop_prob for stage in model.stages] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    features = torch.ones(4, model.num_features, 1, 1)
    assert (model.forward_head(features, pre_logits=True) == 0).any()
    assert (model.eval().forward_head(features, pre_logits=True) == 1).all()


def test_published_patch_rule() -> None:
    for embed_dim, patches in ((80, 2), (96, 4)):
        block = StripMLPNet(**(NANO | {"embed_dim": embed_dim})).stages[0][0]
        assert block.strip_mixing.cgsmm.row_mix.num_patches == patches


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"img_size": 100}, "100.*32.*96"),
        ({"img_size": (64, 40)}, r"\(64, 40\).*32.*\(64, 32\)"),
        ({"img_size": (0, 64)}, r"\(0, 64\).*use \(32, 64\)"),
        ({"img_size": (32, 32, 3)}, r"\(32, 32, 3\).*height, width"),
        ({"depths": (1, 1)}, "four"),
        ({"depths": (1, 0, 1, 1)}, "depths"),
        ({"embed_dim": 15}, "15"),
        ({"embed_dim": 20}, "10 channels.*4 patches"),
        ({"num_patches": 3}, "8 channels.*3 patches"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"drop_rate": -0.1}, "drop_rate is -0.1"),
        ({"drop_path_schedule": "ramp"}, "ramp.*constant.*linear"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"in_chans": 0}, "in_chans is 0"),
    ),
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StripMLPNet(**(NANO | arguments))


def test_wrong_input_is_named() -> None:
    model = StripMLPNet(**NANO)
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\).*\(batch, 3, 32, 32\)"):
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\)"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="float"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("in_chans", (1, 3))
def test_memory_format_of_the_input_is_free(in_chans: int) -> None:
    model = StripMLPNet(**(NANO | {"img_size": 64, "in_chans": in_chans})).eval()
    x = torch.randn(2, in_chans, 64, 64)
    expected = model(x)
    assert torch.equal(model(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(model(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    maps: list[torch.Tensor] = []
    for module in model.stages.modules():
        module.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    model(x)
    maps = [m for m in maps if m.dim() == 4 and m.shape[2] > 1]
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_every_parameter_gets_a_gradient() -> None:
    model = golden_model("nano32", drop_path_rate=0.1)
    training_step(model, images("nano32", 4))
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


@pytest.mark.parametrize("form", ("plain", "accelerated"))
def test_gradient_checkpointing_changes_nothing(form: str) -> None:
    keeping, checkpointing = (golden_model("nano32", drop_path_rate=0.2) for _ in range(2))
    checkpointing.set_grad_checkpointing()
    x = images("nano32", 4)
    losses = []
    for model in (keeping, checkpointing):
        if form == "accelerated":
            accelerate(model, torch.device("cpu"))
        torch.manual_seed(0)
        losses.append(training_step(model, x)[0])
    assert torch.equal(*losses)
    for (name, expected), parameter in zip(keeping.named_parameters(), checkpointing.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
    for (name, expected), buffer in zip(keeping.named_buffers(), checkpointing.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_accelerate_asks_the_device() -> None:
    networks = [accelerate(tiny_network(), torch.device(device)) for device in ("cpu", "cuda")]
    on_cpu, on_gpu = ({type(module) for module in network.modules()} for network in networks)
    assert FastChannelMixingBlock in on_cpu - on_gpu
    assert CastingStripMLPBlock in on_gpu - on_cpu


def test_a_baseline_has_no_other_form() -> None:
    baseline = timm.create_model("resnet18", num_classes=3)
    kinds = list(map(type, baseline.modules()))
    assert inference_form(accelerate(baseline, torch.device("cpu"))) is baseline
    assert list(map(type, baseline.modules())) == kinds
    assert type(inference_form(tiny_network())) is type(tiny_network().to_inference())


def test_build_strip_mlp() -> None:
    model = build_model(model_config(DROP=True, DROP_PATH_SCHEDULE="linear", ALPHA=2))
    assert isinstance(model, StripMLPNet)
    assert model.head_drop.p == 0.2
    assert model.stages[3][0].drop_path.drop_prob == 0.3
    assert model.stages[0][0].channel_mixing.fc1.out_features == 32
    assert build_model(model_config()).head_drop.p == 0.0
    checkpointing = model_config()
    checkpointing.TRAIN.USE_CHECKPOINT = True
    assert build_model(checkpointing).grad_checkpointing


def test_build_timm_baseline(caplog: pytest.LogCaptureFixture) -> None:
    resnet = build_model(model_config(TYPE="timm", TIMM_NAME="resnet18", DROP=True))
    assert resnet(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert resnet.drop_rate == 0.2
    vit = build_model(model_config(TYPE="timm", TIMM_NAME="vit_tiny_patch16_224"))
    assert vit(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    vgg = build_model(model_config(TYPE="timm", TIMM_NAME="vgg11"))
    assert vgg.num_classes == 5
    assert "vgg11" in caplog.text
    assert "drop_path_rate" in caplog.text


@pytest.mark.parametrize("name", ("resnet5O", "swin_tinny_patch4_window7_224", ""))
def test_build_names_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match="TIMM_NAME") as error:
        build_model(model_config(TYPE="timm", TIMM_NAME=name))
    if name:
        assert name[:5] in str(error.value).split(";")[1]
    with pytest.raises(ValueError, match="MODEL.TYPE is 'swin'.*strip_mlp_layer"):
        build_model(model_config(TYPE="swin"))
