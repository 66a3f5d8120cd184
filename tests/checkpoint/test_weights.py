"""Weights from a file into a model: nothing is left out in silence."""

from pathlib import Path

import pytest
import torch
from torch import nn

from utils.checkpoint.weights import load_weights
from utils.errors import CheckpointError


class Network(nn.Module):
    """A body and a classifier, which it names as timm's models do."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.head = nn.Linear(3, classes)

    def get_classifier(self) -> nn.Module:
        return self.head


def unchanged(weights: dict) -> dict:
    return weights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def write(path: Path, **entries: object) -> dict[str, torch.Tensor]:
    """Write a checkpoint with the weights of a fresh network and ``entries``; return the weights."""
    weights = Network().state_dict()
    torch.save({"model": weights, **entries}, path)
    return weights


def test_all_entries_arrive_and_the_rest_is_returned(path: Path) -> None:
    weights = write(path, classes=["a", "b"], optimizer={"state": {}})
    model = Network()
    report, rest = load_weights(model, str(path), remap=unchanged)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert report.matched == list(weights)
    assert rest == {"classes": ["a", "b"]}


@pytest.mark.parametrize("prefix", ("module.", "_orig_mod.", "module._orig_mod."))
def test_prefixes_of_wrappers_are_removed(path: Path, prefix: str) -> None:
    weights = {prefix + key: value for key, value in Network().state_dict().items()}
    torch.save(weights, path)
    model = Network()
    load_weights(model, str(path), remap=unchanged)
    assert torch.equal(model.body.weight, weights[f"{prefix}body.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"extra.weight": torch.ones(2)}, "1 unexpected.*unexpected: extra.weight"),
        ({"body.bias": None}, "1 missing.*missing: body.bias"),
        ({"body.bias": torch.ones(7)}, r"another shape: body.bias is \[7\] in the file, \[3\] in the model"),
        ({"head.bias": torch.ones(7)}, "only the classifier differs: set MODEL.NUM_CLASSES"),
    ),
    ids=("unexpected", "missing", "shape", "classifier"),
)
def test_entries_that_do_not_fit_are_named_and_nothing_changes(path: Path, change: dict, message: str) -> None:
    weights = {**Network().state_dict(), **change}
    torch.save({"model": {key: value for key, value in weights.items() if value is not None}}, path)
    model = Network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"(?s)does not fit the model: .*{message}"):
        load_weights(model, str(path), remap=unchanged)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_classifier_may_be_replaced_but_nothing_else(path: Path) -> None:
    weights = write(path)
    model = Network(classes=5)
    fresh = model.head.weight.clone()
    load_weights(model, str(path), remap=unchanged, replace_head=True)
    assert torch.equal(model.body.weight, weights["body.weight"])
    assert torch.equal(model.head.weight, fresh)
    torch.save({"model": {**weights, "body.bias": torch.ones(7)}}, path)
    with pytest.raises(CheckpointError, match="body.bias"):
        load_weights(model, str(path), remap=unchanged, replace_head=True)


@pytest.mark.parametrize("entries", ({}, {"classes": ["a", "b"]}), ids=("no names", "names"))
def test_a_classifier_kept_without_class_names_is_logged(path: Path, caplog, entries: dict) -> None:
    caplog.set_level("INFO")
    write(path, **entries)
    load_weights(Network(), str(path), remap=unchanged, replace_head=True, classes=["a", "b"])
    kept = "the classifier (head.bias, head.weight) is kept from the file, which holds no class names"
    assert (kept in caplog.text) == (not entries)


def test_a_mismatch_names_the_config_of_the_run(path: Path) -> None:
    write(path)
    with pytest.raises(CheckpointError) as without:
        load_weights(Network(classes=5), str(path), remap=unchanged)
    config = path.with_name("config.yaml")
    config.touch()
    with pytest.raises(CheckpointError, match=f"--cfg {config}"):
        load_weights(Network(classes=5), str(path), remap=unchanged)
    assert "--cfg" not in str(without.value)


def test_nothing_in_common(path: Path) -> None:
    torch.save({"model": {"other": torch.ones(2)}}, path)
    with pytest.raises(CheckpointError, match="is it a checkpoint of another architecture"):
        load_weights(Network(), str(path), remap=unchanged, replace_head=True)


def test_averaged_weights_are_taken_where_they_are_wanted(path: Path) -> None:
    averaged = Network().state_dict()
    weights = write(path, ema=averaged)
    for options, expected in (({}, weights), ({"prefer_ema": True}, averaged), ({"require_ema": True}, averaged)):
        model = Network()
        load_weights(model, str(path), remap=unchanged, **options)
        assert torch.equal(model.body.weight, expected["body.weight"])
    write(path)
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        load_weights(Network(), str(path), remap=unchanged, require_ema=True)
