"""The network against stored outputs of the published implementation: forward, backward and 24 updates.

Each holds for the plain form and for the accelerated one, which is what the CPU trains.
"""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn.utils import clip_grad_norm_

from models import StripMLPNet, accelerate, from_published, to_published
from tests.golden.load import (
    arguments,
    arrays,
    filled,
    golden_model,
    images,
    soft_cross_entropy,
    training_step,
    variants,
)
from tools.bench.reference import ReferenceStripMLP

PUBLISHED = ("tiny_light", "tiny", "small", "base")
TRAINED = ("nano32", "nano80", "tiny_light")
FORMS = {"plain": lambda model: model, "accelerated": lambda model: accelerate(model, torch.device("cpu"))}
both_forms = pytest.mark.parametrize("form", FORMS)


def reference(variant: str) -> ReferenceStripMLP:
    model = ReferenceStripMLP(**arguments(variant))
    model.load_state_dict(filled(variant))
    return model


@both_forms
@pytest.mark.parametrize("variant", PUBLISHED)
def test_logits_and_stages(variant: str, form: str) -> None:
    model = FORMS[form](golden_model(variant)).eval()
    stages: list[torch.Tensor] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _module, _inputs, output: stages.append(output))
    golden = arrays("forward")
    with torch.inference_mode():
        logits = model(images(variant, 2))
    expected = torch.from_numpy(golden[f"{variant}/logits"])
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    for number, stage in enumerate(stages, start=1):
        assert tuple(stage.shape) == tuple(golden[f"{variant}/stage{number}_shape"])
        means = golden[f"{variant}/stage{number}_mean"]  # of the first 32 channels
        np.testing.assert_allclose(stage.mean(dim=(2, 3))[:, :32], means, atol=2e-5 * float(np.abs(means).max()))
        np.testing.assert_allclose(stage.std(), golden[f"{variant}/stage{number}_std"], rtol=2e-5)


def check_backward(variant: str, model: nn.Module, rename: Callable[[dict], dict]) -> None:
    """Compare one training step of `model` with the stored one; `rename` gives the published names."""
    golden = {key.removeprefix(f"{variant}/"): value for key, value in arrays("backward").items()}
    loss, logits = training_step(model, images(variant, 4))
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=1e-3)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-5 * np.abs(golden["logits"]).max())
    named, buffers = rename(dict(model.named_parameters())), rename(dict(model.named_buffers()))
    assert set(golden["grad_names"]) == set(named)
    norms = [named[name].grad.norm().item() for name in golden["grad_names"]]
    # A bias in front of a batch norm has no gradient but rounding, hence the absolute part.
    np.testing.assert_allclose(norms, golden["grad_norms"], rtol=1e-3, atol=1e-6)
    norms = [buffers[name].double().norm().item() for name in golden["buffer_names"]]
    np.testing.assert_allclose(norms, golden["buffer_norms"], rtol=1e-3)


@both_forms
@pytest.mark.parametrize("variant", TRAINED)
def test_gradients_and_buffers(variant: str, form: str) -> None:
    check_backward(variant, FORMS[form](golden_model(variant)), to_published)


@pytest.mark.parametrize("variant", TRAINED)
def test_reference_model_backward(variant: str) -> None:
    check_backward(variant, reference(variant), dict)


@pytest.mark.parametrize("variant", ("tiny_light", "base"))
def test_reference_model_logits(variant: str) -> None:
    with torch.inference_mode():
        logits = reference(variant).eval()(images(variant, 2))
    expected = torch.from_numpy(arrays("forward")[f"{variant}/logits"])
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


@both_forms
@pytest.mark.parametrize("variant", ("nano32", "nano80"))
def test_every_gradient_element_against_the_reference(variant: str, form: str) -> None:
    """Norms could hide a permuted gradient; in float64 each element must agree."""
    ours, plain = FORMS[form](golden_model(variant)).double(), reference(variant).double()
    inputs = images(variant, 3).double()
    loss, _ = training_step(ours, inputs)
    expected, _ = training_step(plain, inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = to_published({name: p.grad for name, p in ours.named_parameters()})
    scale = max(p.grad.abs().max() for p in plain.parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-12 * scale.item(), msg=name)


def run_trajectory(dtype: torch.dtype) -> dict[str, np.ndarray]:
    """The stored 24 updates: AdamW, cosine schedule with warm-up stepped after each update, gradients clipped."""
    golden = arrays("trajectory")
    meta = json.loads(str(golden["meta"]))
    model = golden_model(meta["variant"]).to(dtype)
    names = from_published(dict.fromkeys(map(str, golden["decayed"])))
    decayed = [p for name, p in model.named_parameters() if name in names]
    others = [p for name, p in model.named_parameters() if name not in names]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=meta["base_lr"], weight_decay=meta["weight_decay"])
    steps = meta["steps_per_epoch"]
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=meta["epochs"] * steps,
        lr_min=meta["min_lr"],
        warmup_lr_init=meta["warmup_lr"],
        warmup_t=meta["warmup_epochs"] * steps,
        t_in_epochs=False,
    )
    run: dict[str, list[float]] = {"loss": [], "lr": [], "grad_norm": []}
    for step in range(meta["epochs"] * steps):
        inputs = images(meta["variant"], meta["batch"], salt=1000 + step).to(dtype)
        loss = soft_cross_entropy(model(inputs), step)
        optimizer.zero_grad()
        loss.backward()
        run["grad_norm"].append(clip_grad_norm_(model.parameters(), meta["clip_grad"]).item())
        run["lr"].append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step_update(step)
        run["loss"].append(loss.item())
    with torch.inference_mode():
        logits = model.eval()(images(meta["variant"], 4).to(dtype))
    return {key: np.array(values) for key, values in run.items()} | {"final_logits": logits.numpy()}


def test_trajectory_in_float64() -> None:
    """In float32 the project's own optimizer, schedule and guard repeat it, in ``tests/training/test_recipe.py``."""
    golden, run = arrays("trajectory"), run_trajectory(torch.float64)
    for key in ("loss", "lr", "grad_norm"):
        np.testing.assert_allclose(run[key], golden[key], rtol=1e-5)
    largest = np.abs(golden["final_logits"]).max()
    np.testing.assert_allclose(run["final_logits"], golden["final_logits"], rtol=0, atol=2e-3 * largest)


def test_parameter_counts_and_shapes() -> None:
    for variant, spec in variants().items():
        with torch.device("meta"):
            model = StripMLPNet(**arguments(variant))
        assert sum(p.numel() for p in model.parameters()) == spec["parameters"], variant
        shapes = {name: list(value.shape) for name, value in to_published(model.state_dict()).items()}
        assert shapes == spec["state_dict"], variant
