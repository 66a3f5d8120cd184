"""Optimizer, schedule and loss: the published recipe, checked against the stored training run of the published code."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from models import accelerate, from_published
from tests.builders import config_with, tiny_network
from tests.golden.load import arrays, golden_model, images, soft_cross_entropy
from utils.training.guard import NonFiniteGuard, poison_nonfinite
from utils.training.losses import build_criterion
from utils.training.lr_scheduler import build_scheduler, scaled_learning_rates
from utils.training.optimizer import build_optimizer, param_groups


def golden_config(meta: dict):
    return config_with(
        TRAIN__EPOCHS=meta["epochs"],
        TRAIN__WARMUP_EPOCHS=meta["warmup_epochs"],
        TRAIN__BASE_LR=meta["base_lr"],
        TRAIN__WARMUP_LR=meta["warmup_lr"],
        TRAIN__MIN_LR=meta["min_lr"],
        TRAIN__WEIGHT_DECAY=meta["weight_decay"],
        TRAIN__CLIP_GRAD=meta["clip_grad"],
        DATA__BATCH_SIZE=meta["batch"],
    )


@pytest.mark.parametrize("form", ("plain", "accelerated"))
def test_stored_training_run_through_the_projects_own_parts(form: str) -> None:
    golden = arrays("trajectory")
    meta = json.loads(str(golden["meta"]))
    config = golden_config(meta)
    model = golden_model(meta["variant"])
    if form == "accelerated":
        accelerate(model, torch.device("cpu"))
    lrs = scaled_learning_rates(config, world_size=1)
    optimizer = build_optimizer(config, model, lrs.base)
    scheduler = build_scheduler(config, optimizer, lrs, meta["steps_per_epoch"])
    guard = NonFiniteGuard(model, torch.device("cpu"), 20)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    seen = {"loss": [], "lr": [], "grad_norm": []}
    for step in range(meta["epochs"] * meta["steps_per_epoch"]):
        guard.begin({})
        loss = soft_cross_entropy(model(images(meta["variant"], meta["batch"], salt=1000 + step)), step)
        poison_nonfinite(loss).backward()
        grad_norm = clip_grad_norm_(model.parameters(), config.TRAIN.CLIP_GRAD)
        for key, value in (("loss", loss), ("lr", optimizer.param_groups[0]["lr"]), ("grad_norm", grad_norm)):
            seen[key].append(float(torch.as_tensor(value).detach()))
        assert not guard.step_unless_nonfinite(optimizer, scaler, grad_norm)
        optimizer.zero_grad()
        scheduler.step_update(step)
    for key, values in seen.items():
        np.testing.assert_allclose(values, golden[key], rtol=1e-5, err_msg=key)
    with torch.inference_mode():
        logits = model.eval()(images(meta["variant"], 4)).numpy()
    expected = golden["final_logits"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_decayed_parameters_are_the_published_ones() -> None:
    golden = arrays("trajectory")
    model = golden_model("nano32")
    decayed, free = param_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == set(from_published(dict.fromkeys(map(str, golden["decayed"]))))
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_a_model_names_further_parameters_that_are_not_decayed() -> None:
    model = nn.Linear(2, 2)
    model.no_weight_decay = lambda: {"weight"}
    optimizer = build_optimizer(config_with(), model, 1e-3)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2]


def rates(config, updates_per_epoch: int = 10) -> list[float]:
    """Return the rate of each update of the run."""
    model = nn.Linear(2, 2)
    lrs = scaled_learning_rates(config, world_size=1)
    optimizer = build_optimizer(config, model, lrs.base)
    scheduler = build_scheduler(config, optimizer, lrs, updates_per_epoch)
    seen = []
    for update in range(config.TRAIN.EPOCHS * updates_per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(update)
    return seen


def test_cosine_warms_up_and_ends_low_with_the_published_kink_unless_asked() -> None:
    base = {"TRAIN__EPOCHS": 10, "TRAIN__WARMUP_EPOCHS": 2}
    published = rates(config_with(**base))
    assert published[0] == pytest.approx(5e-7)
    assert max(published) < 5e-4 * 0.96  # the cosine has been falling since update 0, so the peak is never reached
    assert published[-1] == pytest.approx(5e-6, rel=0.1)
    smooth = rates(config_with(**base, TRAIN__LR_SCHEDULER__WARMUP_PREFIX=True))
    assert max(smooth) == pytest.approx(5e-4)
    assert smooth.index(max(smooth)) == 21  # one update after warm-up, as every rate takes effect one update later
    rising, falling = np.diff(smooth[1:22]), np.diff(smooth[21:])
    assert (rising > 0).all()
    assert (falling < 0).all()


def test_linear_and_step_schedules() -> None:
    base = {"TRAIN__EPOCHS": 10, "TRAIN__WARMUP_EPOCHS": 2}
    linear = rates(config_with(**base, TRAIN__LR_SCHEDULER__NAME="linear"))
    assert linear[61] == pytest.approx(5e-4 * (1 - 0.99 * 0.5))  # half way between warm-up and the end
    step = rates(config_with(**base, TRAIN__LR_SCHEDULER__NAME="step", TRAIN__LR_SCHEDULER__DECAY_EPOCHS=4))
    assert step[31] == pytest.approx(5e-4)
    assert step[45] == pytest.approx(5e-5)
    assert step[95] == pytest.approx(5e-6)


def test_learning_rate_scaling() -> None:
    assert scaled_learning_rates(config_with(), 8).base == 5e-4  # the published run does not scale
    linear = scaled_learning_rates(config_with(TRAIN__LR_SCALING="linear", TRAIN__ACCUMULATION_STEPS=4), 8)
    assert linear.base == pytest.approx(5e-4 * 4)  # 64 x 8 x 4 = 2048 images
    assert linear.minimum == pytest.approx(5e-6 * 4)
    assert scaled_learning_rates(config_with(TRAIN__LR_SCALING="sqrt"), 32).base == pytest.approx(5e-4 * 2)


def test_criterion_follows_the_targets() -> None:
    logits = torch.randn(4, 5)
    labels = torch.tensor([0, 1, 2, 3])
    smoothed = 0.9 * nn.functional.one_hot(labels, 5).float() + 0.1 / 5
    soft = build_criterion(config_with(), soft_targets=True)(logits, smoothed)
    hard = build_criterion(config_with(), soft_targets=False)(logits, labels)
    torch.testing.assert_close(soft, hard)
    plain = build_criterion(config_with(MODEL__LABEL_SMOOTHING=0.0), soft_targets=False)(logits, labels)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("name", ("adamw", "sgd"))
def test_optimizers_descend(name: str) -> None:
    torch.manual_seed(0)
    config = config_with(TRAIN__OPTIMIZER__NAME=name)
    model = tiny_network(drop_path_rate=0.0)
    optimizer = build_optimizer(config, model, 1e-2)
    inputs, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_frozen_model_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(config_with(), model, 1e-3)
