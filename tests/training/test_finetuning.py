"""Fine-tuning: layers at rates of their own, frozen parts, other optimizers and losses; all exact when resumed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import list_optimizers
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from data.images.batch import build_batch_transform
from models import accelerate, build_model, frozen_parts
from models.freezing import freeze
from tests.builders import config_with, model_config, tiny_network
from tests.tiny_run import TinyRun
from utils.checkpoint.capture import capture, restore
from utils.checkpoint.files import load_checkpoint
from utils.config.keys import KEYS
from utils.training import batchnorm
from utils.training.batchnorm import averaged_batchnorm, batchnorm_buffers
from utils.training.guard import NonFiniteGuard, poison_nonfinite
from utils.training.losses import build_criterion
from utils.training.lr_scheduler import build_scheduler, scaled_learning_rates
from utils.training.meters import RunningMeans
from utils.training.optimizer import build_optimizer, layer_groups
from utils.training.state import TrainState

pytestmark = pytest.mark.usefixtures("no_drawing")

CPU = torch.device("cpu")
TIMM_OPTIMIZERS = [name for name in KEYS["TRAIN.OPTIMIZER.NAME"].choices if name not in ("adamw", "sgd")]
PARTS = {
    "stem": ["patch_embed"],
    "stages1": ["patch_embed", "stages.0"],
    "stages2": ["patch_embed", "stages.0", "stages.1", "merging.0"],
    "stages3": ["patch_embed", "stages.0", "stages.1", "stages.2", "merging.0", "merging.1", "skip_1_to_3"],
    "stages4": ["patch_embed", "stages", "merging", "skip_1_to_3", "skip_1_to_4", "skip_2_to_4"],
    "head_only": ["patch_embed", "stages", "merging", "skip_1_to_3", "skip_1_to_4", "skip_2_to_4", "norm"],
}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


def pairs(**keys: Any) -> list[Any]:
    """Return the words of ``--opts`` for keys such as ``TRAIN__FREEZE="stem"``."""
    return ["--opts", *(word for name, value in keys.items() for word in (name.replace("__", "."), value))]


# layers


def layer_scales(model: nn.Module, decay: float) -> list[tuple[float, set[str]]]:
    """Return the factor on the rate and the parameters of each layer, the first one first."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers: dict[float, set[str]] = {}
    for group in layer_groups(model, 0.05, decay):
        layers.setdefault(group["lr_scale"], set()).update(names[id(p)] for p in group["params"])
        assert group["weight_decay"] == (0.05 if group["params"][0].ndim > 1 else 0.0)
    return sorted(layers.items())


def test_layer_decay_is_monotone_with_one_layer_per_block() -> None:
    model = tiny_network(depths=(1, 2, 3, 1))
    layers = layer_scales(model, 0.5)
    assert [scale for scale, _ in layers] == pytest.approx([0.5**power for power in range(8, -1, -1)])
    blocks = [f"stages.{stage}.{block}" for stage, depth in enumerate((1, 2, 3, 1)) for block in range(depth)]
    for block, (_, names) in zip(blocks, layers[1:-1], strict=True):
        assert {name for name in names if name.startswith("stages")} == {
            name for name, _ in model.named_parameters() if name.startswith(f"{block}.")
        }
    assert layers[0][1] == {"patch_embed.weight"}
    assert "merging.0.weight" in layers[2][1]  # with the first block that it feeds
    assert {name.split(".")[0] for name in layers[-1][1]} == {"norm", "head"}
    assert set().union(*(names for _, names in layers)) == {name for name, _ in model.named_parameters()}


def test_schedule_scales_every_layer_and_the_log_names_the_unscaled_rate() -> None:
    config = config_with(TRAIN__EPOCHS=4, TRAIN__WARMUP_EPOCHS=1, TRAIN__LAYER_DECAY=0.5)
    model, lrs = tiny_network(), scaled_learning_rates(config, 1)
    optimizer, plain = build_optimizer(config, model, lrs.base), build_optimizer(config_with(), model, lrs.base)
    assert all(group["fused"] for group in optimizer.param_groups)
    schedulers = [build_scheduler(config, one, lrs, 5) for one in (optimizer, plain)]
    state = TrainState(model, optimizer, schedulers[0], None, None, None)
    for update in range(20):
        rate = plain.param_groups[0]["lr"]
        assert state.learning_rate == rate
        assert [group["lr"] for group in optimizer.param_groups] == [
            rate * group["lr_scale"] for group in optimizer.param_groups
        ]
        for scheduler in schedulers:
            scheduler.step_update(update)


def test_layer_decay_of_timm_models_and_of_a_model_without_layers() -> None:
    assert len(layer_scales(timm.create_model("test_convnext"), 0.8)) == 11  # stem, nine blocks, head
    with pytest.raises(ValueError, match=r"TRAIN.LAYER_DECAY is 0.8, but Linear .* set TRAIN.LAYER_DECAY 1.0"):
        build_optimizer(config_with(TRAIN__LAYER_DECAY=0.8), nn.Linear(2, 2), 1e-3)


# frozen parts


def frozen_model(part: str, **keys: Any) -> nn.Module:
    config = model_config(**keys)
    config.TRAIN.FREEZE = part
    torch.manual_seed(0)
    return build_model(config)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_frozen_does_not_move(part: str) -> None:
    """Neither weights nor statistics, in the form that training uses, wrapped, with recomputed activations."""
    model = accelerate(frozen_model(part, DROP_PATH_RATE=0.0), CPU)
    model.set_grad_checkpointing(True)
    assert frozen_parts(model) == PARTS[part]
    wrapped = copy.deepcopy(model).train()
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    optimizer = build_optimizer(config_with(TRAIN__WEIGHT_DECAY=0.5), wrapped, 1e-2)
    wrapped(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    for name, value in wrapped.state_dict().items():
        frozen = any(name.startswith(f"{prefix}.") for prefix in PARTS[part])
        assert torch.equal(value, before[name]) is frozen or name.endswith("grn.gamma"), name


@pytest.mark.parametrize("part", ("stages2", "head_only"))
def test_frozen_parts_stay_in_evaluation_mode(part: str) -> None:
    model = frozen_model(part)
    for candidate in (model, copy.deepcopy(model)):
        for mode in (True, False, True):
            candidate.train(mode)
            for name, module in candidate.named_modules():
                inside = any(f"{name}.".startswith(f"{prefix}.") for prefix in PARTS[part])
                assert module.training is (mode and not inside), name
    assert copy.deepcopy(model).train().training
    images = torch.randn(2, 3, 32, 32)
    if part == "head_only":  # no DropPath, no batch statistics: the scores are those of evaluation
        assert torch.equal(model.train()(images), model.eval()(images))


def test_a_run_leaves_what_is_frozen_as_it_was(tiny: TinyRun) -> None:
    """A run from averaged weights, with accumulation and an average of its own, leaves what is frozen as it was."""
    source = tiny.train(*pairs(TRAIN__EMA_DECAY=0.5), tag="source") / "checkpoint_last.pth"
    words = pairs(TRAIN__FREEZE="stages2", TRAIN__EMA_DECAY=0.9, TRAIN__LAYER_DECAY=0.7)
    folder = tiny.train("--pretrained", source, "--accumulation-steps", 2, "--use-checkpoint", *words, tag="frozen")
    start, end = load_checkpoint(source)["ema"], load_checkpoint(folder / "checkpoint_last.pth")
    for name, value in start.items():
        if any(name.startswith(f"{prefix}.") for prefix in PARTS["stages2"]):
            assert torch.equal(end["model"][name], value), name
            assert torch.equal(end["ema"][name], value), name
    trained = "stages.2.0.strip_mixing.fuse.weight"
    assert not torch.equal(end["model"][trained], start[trained])
    log = (folder / "log_rank0.txt").read_text()
    assert "frozen, TRAIN.FREEZE stages2: patch_embed, stages.0, stages.1, merging.0" in log


def test_statistics_of_frozen_layers_are_not_averaged_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of three equal numbers may differ from them in the last bit."""
    model = frozen_model("stages2")
    norms = {name for name in batchnorm_buffers(model) if name.endswith(("mean", "var"))}
    frozen = {name for name in norms if any(name.startswith(f"{prefix}.") for prefix in PARTS["stages2"])}
    buffers = dict(model.named_buffers())
    monkeypatch.setattr(batchnorm, "get_world_size", lambda: 3)
    monkeypatch.setattr(batchnorm, "all_reduce_sum", lambda flat: flat.mul_(6))
    before = {name: buffers[name].clone() for name in norms}
    buffers["norm.running_mean"].fill_(1.0)
    before["norm.running_mean"].fill_(1.0)
    with averaged_batchnorm(model):
        for name in norms:
            assert torch.equal(buffers[name], before[name] * (1 if name in frozen else 2)), name
    assert 0 < len(frozen) < len(norms)
    assert all(torch.equal(buffers[name], before[name]) for name in norms)


def test_frozen_timm_models_follow_their_group_matcher() -> None:
    model = timm.create_model("test_resnet")
    freeze(model, "stages2")
    assert frozen_parts(model) == ["conv1", "bn1", "layer1", "layer2"]
    with pytest.raises(ValueError, match="stages9: ResNet has only 4 stages"):
        freeze(timm.create_model("test_resnet"), "stages9")
    with pytest.raises(ValueError, match=r"Linear does not say what its stages are .* take head_only or none"):
        freeze(nn.Linear(2, 2), "stem")
    with pytest.raises(ValueError, match="Linear does not say what its classifier is"):
        freeze(nn.Linear(2, 2), "head_only")


def test_freezing_the_whole_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="TRAIN.FREEZE head_only freezes all of StripMLPNet; nothing is left to train"):
        freeze(tiny_network(num_classes=0), "head_only")


def test_parts_that_are_not_known_are_found_before_the_data(tiny: TinyRun, capsys: pytest.CaptureFixture) -> None:
    keys = {"MODEL__TYPE": "timm", "MODEL__TIMM_NAME": "pit_ti_224", "DATA__IMG_SIZE": 224, "TRAIN__FREEZE": "stages4"}
    with pytest.raises(SystemExit):
        tiny.train("--data-path", "nowhere", *pairs(**keys), tag="none")
    out = capsys.readouterr().out
    assert "TRAIN.FREEZE stages4: PoolingVisionTransformer does not say what its stages are (group_matcher)" in out
    assert "Traceback" not in out


def test_head_scale() -> None:
    heads = []
    for scale in (1.0, 0.01):
        torch.manual_seed(0)
        heads.append(build_model(model_config(HEAD_INIT_SCALE=scale)).head)
    torch.testing.assert_close(heads[1].weight, 0.01 * heads[0].weight)
    torch.testing.assert_close(heads[1].bias, 0.01 * heads[0].bias)


# what is seen


def test_mixing_ends_before_the_last_epochs() -> None:
    config = config_with(TRAIN__EPOCHS=10, AUG__MIXUP_OFF_EPOCHS=3, AUG__REPROB=0.0, MODEL__NUM_CLASSES=4)
    transform = build_batch_transform(config, is_train=True, device=CPU)
    images, labels, indices = torch.randn(4, 3, 8, 8), torch.arange(4), torch.arange(4)
    mixed, _ = transform(images.clone(), labels, indices, epoch=6, update=1)
    plain, targets = transform(images.clone(), labels, indices, epoch=7, update=1)
    assert not torch.equal(mixed, images)
    assert torch.equal(plain, images)
    torch.testing.assert_close(targets, 0.9 * torch.eye(4) + 0.1 / 4)
    again, _ = transform(images.clone(), labels, indices, epoch=6, update=1)  # a resumed run may go back
    assert torch.equal(again, mixed)


def test_binary_cross_entropy() -> None:
    scores, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    soft = 0.6 * nn.functional.one_hot(labels, 5).float() + 0.4 * nn.functional.one_hot(labels + 1, 5)
    plain = build_criterion(config_with(TRAIN__LOSS__NAME="bce"), soft_targets=True)(scores, soft)
    torch.testing.assert_close(plain, nn.functional.binary_cross_entropy_with_logits(scores, soft))
    keys = {"TRAIN__LOSS__NAME": "bce", "TRAIN__LOSS__BCE_THRESHOLD": 0.2, "TRAIN__LOSS__BCE_SUM": True}
    hard = build_criterion(config_with(**keys), soft_targets=True)(scores, soft)
    expected = 5 * nn.functional.binary_cross_entropy_with_logits(scores, (soft > 0).float())
    torch.testing.assert_close(hard, expected)
    smooth = build_criterion(config_with(TRAIN__LOSS__NAME="bce"), soft_targets=False)(scores, labels)
    one_hot = 0.9 * nn.functional.one_hot(labels, 5).float() + 0.1 / 5
    torch.testing.assert_close(smooth, nn.functional.binary_cross_entropy_with_logits(scores, one_hot))


# optimizers


class Training:
    """A small model and what trains it, as main.py does."""

    def __init__(self, optimizer: str, options: str = "") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
        config = config_with(TRAIN__OPTIMIZER__NAME=optimizer, TRAIN__OPTIMIZER__OPTIONS=options)
        lrs = scaled_learning_rates(config, 1)
        built = build_optimizer(config, self.model, lrs.base)
        scheduler = build_scheduler(config, built, lrs, 10)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        guard = NonFiniteGuard(self.model, CPU, 5)
        self.state = TrainState(self.model, built, scheduler, scaler, guard, RunningMeans(CPU))

    def update(self, *, bad: bool = False) -> None:
        progress, state = self.state.progress, self.state
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(progress.global_step))
        state.guard.begin({})
        loss = self.model(images).square().mean() * (float("nan") if bad else 1.0)
        poison_nonfinite(loss).backward()
        norm = clip_grad_norm_(self.model.parameters(), 5.0)
        state.guard.step_unless_nonfinite(state.optimizer, state.scaler, norm)
        state.optimizer.zero_grad()
        state.scheduler.step_update(progress.global_step)
        progress.global_step += 1

    def payload(self) -> dict[str, Any]:
        return copy.deepcopy(capture(self.state, {"config": ""}))


def test_listed_optimizers_are_timms() -> None:
    assert set(TIMM_OPTIMIZERS) <= set(list_optimizers())


@pytest.mark.parametrize("name", TIMM_OPTIMIZERS)
def test_a_timm_optimizer_skips_without_a_trace_and_resumes_exactly(name: str) -> None:
    whole = Training(name)
    initial = copy.deepcopy(whole.model.state_dict())
    whole.update(bad=True)  # a resumed state without moments
    first = whole.payload()
    assert same(dict(whole.model.state_dict()), dict(initial))
    whole.update()
    whole.update()
    trained = whole.payload()
    assert not same(dict(whole.model.state_dict()), dict(initial))
    whole.update(bad=True)
    for key in ("model", "optimizer"):
        moved = {"optimizer": lambda p: p["optimizer"]["state"], "model": lambda p: p["model"]}[key]
        assert same(moved(whole.payload()), moved(trained))
    for payload in (first, trained):
        resumed = Training(name)
        restore(resumed.state, copy.deepcopy(payload), Path("a.pth"))
        resumed.state.scheduler.step_update(payload["progress"]["global_step"] - 1)
        while resumed.state.progress.global_step < 5:
            resumed.update(bad=resumed.state.progress.global_step == 3)
        if whole.state.progress.global_step < 5:
            whole.update()
        assert same(resumed.payload()["model"], whole.payload()["model"])
        assert same(resumed.payload()["optimizer"], whole.payload()["optimizer"])


def test_options_of_an_optimizer() -> None:
    optimizer = Training("lamb", "eps=1e-3, betas=(0.8, 0.9)").state.optimizer
    assert (optimizer.param_groups[0]["eps"], optimizer.param_groups[0]["betas"]) == (1e-3, (0.8, 0.9))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    with pytest.raises(ValueError, match=r"NAME lion refuses .*OPTIONS .*'eps'.* it knows betas, .*caution"):
        Training("lion", "eps=1e-8")
    with pytest.raises(ValueError, match=r"NAME lion refuses .*OPTIONS .*betas"):
        Training("lion", "betas=(2.0, 0.9)")


def test_a_damaged_state_of_a_timm_optimizer_is_refused() -> None:
    training = Training("lamb")
    training.update()
    for damage in ("missing", "shape", "infinite", "counter"):
        payload = training.payload()
        moments = payload["optimizer"]["state"][0]
        if damage == "missing":
            del moments["exp_avg"]
        elif damage == "shape":
            moments["exp_avg"] = moments["exp_avg"][:1]
        elif damage == "infinite":
            moments["exp_avg"][0] = float("inf")
        else:
            payload["optimizer"]["param_groups"][0]["step"] = "many"
        with pytest.raises(RuntimeError, match=r"a\.pth does not fit this run"):
            restore(Training("lamb").state, payload, Path("a.pth"))


def test_everything_together_resumes_exactly(tiny: TinyRun) -> None:
    words = pairs(
        TRAIN__OPTIMIZER__NAME="lamb",
        TRAIN__LAYER_DECAY=0.7,
        TRAIN__FREEZE="stages1",
        TRAIN__LOSS__NAME="bce",
        TRAIN__EMA_DECAY=0.9,
        MODEL__HEAD_INIT_SCALE=0.1,
        AUG__MIXUP_OFF_EPOCHS=1,
        AUG__REPEATS=3,
    )
    whole = tiny.train(*words, "TRAIN.SAVE_STEPS", 1, "TRAIN.SAVE_KEEP", 100, tag="whole")
    resumed = tiny.train("--resume", whole / "checkpoint_step_000000004.pth", *words, tag="resumed")
    ends = [load_checkpoint(folder / "checkpoint_last.pth") for folder in (whole, resumed)]
    for name in ("model", "ema", "optimizer", "lr", "guard", "progress", "rank_state"):
        assert same(ends[0][name], ends[1][name]), name
