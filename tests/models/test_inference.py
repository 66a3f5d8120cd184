"""The inference form: the same scores as the network, folded, frozen, and exportable."""

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.fast import autograd
from tests.builders import tiny_network
from tests.golden.load import arrays, golden_model, images

ONNX_BATCHES = (1, 2, 5)


@pytest.mark.parametrize("variant", ("nano32", "nano80", "tiny_light", "small"))
def test_scores_are_the_networks(variant: str) -> None:
    model, inputs = golden_model(variant).eval(), images(variant, 3)
    with torch.inference_mode():
        expected, actual = model(inputs), model.to_inference()(inputs)
    assert (actual - expected).abs().max() <= 5e-6 * expected.abs().max()


@pytest.mark.parametrize("variant", ("tiny", "base"))
def test_scores_are_the_published_ones(variant: str) -> None:
    expected = torch.from_numpy(arrays("forward")[f"{variant}/logits"])
    with torch.inference_mode():
        actual = golden_model(variant).to_inference()(images(variant, 2))
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_memory_order_and_batch_size_do_not_matter() -> None:
    form, inputs = golden_model("nano32").to_inference(), images("nano32", 7)
    with torch.inference_mode():
        whole = form(inputs)
        torch.testing.assert_close(form(inputs.contiguous(memory_format=torch.channels_last)), whole)
        torch.testing.assert_close(torch.cat([form(part) for part in inputs.split(3)]), whole, rtol=1e-5, atol=1e-6)


def test_the_network_is_left_alone() -> None:
    model = golden_model("nano32").train()
    before = copy.deepcopy(model.state_dict())
    form = model.to_inference()
    with torch.inference_mode():
        form(images("nano32", 2))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_refuses_to_train() -> None:
    form = golden_model("nano32").to_inference()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        form.train()
    assert not form.eval().training
    assert not any(module.training for module in form.modules())
    assert not any(parameter.requires_grad for parameter in form.parameters())


def test_it_keeps_the_weights_of_its_moment() -> None:
    model, inputs = golden_model("nano32"), images("nano32", 2)
    form = model.to_inference()
    with torch.inference_mode():
        before = form(inputs)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(form(inputs), before)


def test_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \(batch, 3, 64, 64\)"):
        golden_model("nano32").to_inference()(torch.randn(1, 3, 32, 32))


def test_without_head_it_gives_features() -> None:
    model = tiny_network(num_classes=0).eval()
    inputs = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model.to_inference()(inputs), model(inputs), rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_is_close() -> None:
    form, inputs = golden_model("nano32").to_inference(), images("nano32", 4)
    with torch.inference_mode():
        expected = form(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            actual = form(inputs)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() <= 0.05 * expected.abs().max()


def test_it_can_be_saved_and_loaded() -> None:
    form, inputs = golden_model("nano32").to_inference(), images("nano32", 2)
    buffer = io.BytesIO()
    torch.save(form.state_dict(), buffer)
    buffer.seek(0)
    other = golden_model("nano32", num_classes=10).to_inference()
    other.load_state_dict({key: torch.zeros_like(value) for key, value in other.state_dict().items()})
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.inference_mode():
        assert torch.equal(other(inputs), form(inputs))


@pytest.mark.faults  # the same is tested through tools/export.py
def test_onnx_with_any_batch(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    form, path = golden_model("nano32").to_inference(), tmp_path / "strip_mlp.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        form,
        (images("nano32", 2),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["scores"],
        dynamic_shapes=({0: batch},),
    )
    program.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ONNX_BATCHES:
        inputs = images("nano32", size)
        (scores,) = session.run(None, {"images": inputs.numpy()})
        with torch.inference_mode():
            expected = form(inputs).numpy()
        np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_no_batchnorm_is_left() -> None:
    form = golden_model("nano32").to_inference()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in form.modules())


def test_packed_weights_compute_what_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    form, inputs = golden_model("nano80").to_inference(), images("nano80", 3)
    with torch.inference_mode():
        packed = form(inputs)
        monkeypatch.setattr(autograd, "DEVICES", frozenset())
        plain = form(inputs)
    assert (packed - plain).abs().max() <= 2e-6 * plain.abs().max()


def test_packed_weights_follow_the_weights() -> None:
    form, inputs = golden_model("nano32").to_inference(), images("nano32", 2)
    with torch.inference_mode():
        before = form(inputs)  # packs the weights
    copied, state = copy.deepcopy(form), {key: value.clone() for key, value in form.state_dict().items()}
    form.load_state_dict({key: value * 0.5 for key, value in state.items()})
    with torch.inference_mode():
        halved = form(inputs)
        assert torch.equal(copied(inputs), before)
        copied.load_state_dict({key: value * 0.5 for key, value in state.items()})
        assert torch.equal(copied(inputs), halved)
        assert not torch.allclose(halved, before)
    form.load_state_dict(state)
    with torch.inference_mode():
        assert torch.equal(form(inputs), before)
        doubled = form.double()(inputs.double())
    torch.testing.assert_close(doubled.float(), before, rtol=1e-4, atol=1e-5)


def test_it_refuses_gradients() -> None:
    form, inputs = golden_model("nano32").to_inference(), images("nano32", 2).requires_grad_()
    with pytest.raises(RuntimeError, match="gives no gradients"):
        form(inputs)
    with torch.no_grad():
        assert torch.isfinite(form(inputs)).all()
