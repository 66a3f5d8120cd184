"""Checkpoints as other projects write them: opened without running anything, their weights found or asked for."""

import argparse
import collections
import datetime
import enum
import functools
import logging
import pathlib
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from models import from_published
from tests.builders import tiny_network
from utils.checkpoint import load_weights, read_training_state
from utils.checkpoint.files import load_checkpoint, verify_checkpoint
from utils.errors import CheckpointError


class Settings(dict):
    """A mapping of another project."""


class Colour(enum.Enum):
    RED = 1


class Refuses:
    """A class of another project whose constructor must never run when a file is read."""

    allowed = True

    def __init__(self) -> None:
        assert self.allowed, "a constructor was called"

    def __setstate__(self, state: dict) -> None:
        raise AssertionError("a state was set")


class Calls:
    """Pickles into a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "theirs.pth"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return tiny_network().state_dict()


def load(path: Path, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Any]:
    model = model or tiny_network()
    report, _ = load_weights(model, str(path), remap=from_published, prefer_ema=True, **options)
    return model, report


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


COMPANIONS = {
    "Namespace": argparse.Namespace(lr=1e-3, betas=None),
    "numpy scalar": np.float64(76.3),
    "numpy array": np.arange(3),
    "path": pathlib.PurePosixPath("out"),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "deque": collections.deque([1, 2]),
    "date": datetime.datetime(2024, 1, 2),
    "partial": functools.partial(int, base=2),
    "enum": Colour.RED,
    "a mapping": Settings(lr=1),
    "an object": Refuses(),
}


@pytest.mark.parametrize("legacy", (False, True), ids=("zip", "legacy"))
@pytest.mark.parametrize("kind", COMPANIONS)
def test_what_lies_next_to_the_weights_does_no_harm(path, weights, monkeypatch, kind, legacy):
    torch.save(
        {"args": COMPANIONS[kind], "state_dict": weights, "epoch": 9}, path, _use_new_zipfile_serialization=not legacy
    )
    monkeypatch.setattr(Refuses, "allowed", False)
    assert same(load(path)[0], weights)
    with pytest.raises(CheckpointError, match="was not written by this project .* start from its weights with --pretr"):
        read_training_state(path)
    torch.save({"args": COMPANIONS[kind], "state_dict": weights, "digest": "sha256-of-crc32:0"}, path)
    with pytest.raises(CheckpointError, match="asks to import"):  # a file of ours: there nothing is replaced
        verify_checkpoint(path)


def test_what_a_mapping_of_theirs_holds_is_data(path):
    torch.save({"settings": Settings(lr=0.5), "counts": collections.defaultdict(int, a=1)}, path)
    assert load_checkpoint(path) == {"settings": {"lr": 0.5}, "counts": {"a": 1}}


@pytest.mark.parametrize("container", (Settings, functools.partial(collections.defaultdict, int)))
def test_weights_in_a_mapping_of_theirs(path, weights, container):
    torch.save({"state_dict": container(weights)}, path)
    assert same(load(path)[0], weights)


@pytest.mark.parametrize(
    ("call", "name"),
    (
        (Calls(subprocess.check_output, ["touch", "canary"]), "subprocess.check_output"),
        (Calls(eval, "open('canary', 'w')"), "builtins.eval"),
        (Calls(__import__, "os"), "builtins.__import__"),
    ),
)
def test_functions_of_the_standard_library_are_refused(path, weights, monkeypatch, call, name):
    torch.save({"state_dict": weights, "x": call, "args": argparse.Namespace()}, path)
    monkeypatch.chdir(path.parent)
    with pytest.raises(CheckpointError, match=f"asks to import {name}, which could run code"):
        load(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_function_of_another_package_is_not_called(path, weights, monkeypatch):
    torch.save({"state_dict": weights, "x": Calls(torch.hub.load, "a/b", "c")}, path)
    monkeypatch.setattr(torch.hub, "load", lambda *_: pytest.fail("it was called"))
    assert same(load(path)[0], weights)


@pytest.mark.parametrize("value", (nn.Linear(2, 2), [1]), ids=("whole model", "list"))
def test_no_mapping(path, value):
    torch.save(value, path)
    with pytest.raises(CheckpointError, match="not a checkpoint") as error:
        load(path)
    assert ("save its state_dict() instead" in str(error.value)) == isinstance(value, nn.Module)


FORMS = {
    "bare": ("", ""),
    "timm": ("state_dict", ""),
    "pycls": ("model_state", ""),
    "tutorials": ("model_state_dict", ""),
    "DeepSpeed": ("module", ""),
    "net": ("net", ""),
    "weights": ("weights", ""),
    "BasicSR": ("params", ""),
    "Lightning": ("state_dict", "model."),
    "MMPretrain": ("state_dict", "backbone."),
    "compiled": ("model", "_orig_mod."),
    "compiled, then wrapped": ("", "module._orig_mod."),
    "wrapped, then compiled": ("", "_orig_mod.module."),
    "teacher alone": ("teacher", "module.backbone."),
    "average alone": ("model_ema", "module."),
    "one level down": ("state.model", ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_entry_and_prefix_are_found_and_logged(path, weights, caplog, form):
    entry, prefix = FORMS[form]
    content: dict[str, Any] = prefixed(weights, prefix)
    for name in reversed(entry.split(".") if entry else ()):
        content = {name: content, "epoch": 3}
    torch.save(content, path)
    with caplog.at_level(logging.INFO):
        model, report = load(path)
    assert same(model, weights)
    assert not report.unexpected
    assert (f"entry {entry!r}" if entry else "the file itself") in caplog.text
    assert ("without the prefix " + repr(prefix) in caplog.text) == bool(prefix)


def test_counters_of_profilers_and_averages_are_left_out(path, weights):
    counters = {"total_ops": torch.zeros(1), "patch_embed.total_params": torch.zeros(1), "n_averaged": torch.tensor(5)}
    torch.save({"model_ema": {**counters, **prefixed(weights, "module.")}}, path)
    assert same(load(path)[0], weights)


def test_two_candidates_are_listed_and_the_flags_choose(path, weights):
    student = {name: value + 1 for name, value in weights.items()}
    torch.save({"student": prefixed(student, "module.backbone."), "teacher": prefixed(weights, "backbone.")}, path)
    with pytest.raises(CheckpointError, match="(?s)'student'.*'teacher'.*--weights-key.*--strip-prefix"):
        load(path)
    assert same(load(path, key="teacher")[0], weights)
    assert same(load(path, key="student", prefix="module.backbone.")[0], student)
    for wrong, message in (({"key": "net"}, "--weights-key"), ({"key": "teacher", "prefix": "x."}, "--strip-prefix")):
        with pytest.raises(CheckpointError, match=message):
            load(path, **wrong)


def test_a_prefix_that_is_named_leaves_other_entries_out(path, weights):
    torch.save({"state_dict": {**prefixed(weights, "backbone."), "neck.weight": torch.ones(2)}}, path)
    with pytest.raises(CheckpointError, match="none of its entries belongs"):
        load(path)
    assert same(load(path, prefix="backbone.")[0], weights)


class Wrapped(nn.Module):
    """A network with the name of a wrapper inside its names."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.ModuleDict({"module": nn.Linear(2, 2)})
        self.module = nn.Linear(2, 2)


def test_wrapper_names_inside_names_stay(path):
    weights = Wrapped().state_dict()
    for prefix in ("", "module."):
        torch.save({"model": prefixed(weights, prefix)}, path)
        assert same(load(path, Wrapped())[0], weights)


# the classifier


def test_a_head_for_other_classes_of_equal_number_is_fresh(path, weights, caplog):
    torch.save({"model": weights, "classes": ["a", "b", "c"]}, path)
    for classes, kept in ((["a", "b", "c"], True), (["x", "y", "z"], False), (["b", "a", "c"], False)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            model, _ = load(path, replace_head=True, classes=classes)
        assert torch.equal(model.head.weight, weights["head.weight"]) is kept
        assert torch.equal(model.norm.weight, weights["norm.weight"])
        assert ("the file's head is for other classes" in caplog.text) is not kept


@pytest.mark.parametrize("name", ("deit_tiny_distilled_patch16_224", "levit_128s"))
def test_all_heads_of_a_timm_model_are_replaced(path, name):
    theirs, ours = (timm.create_model(name, num_classes=classes) for classes in (5, 3))
    torch.save(theirs.state_dict(), path)
    fresh = {name: value.clone() for name, value in ours.state_dict().items()}
    _, report = load(path, ours, replace_head=True)
    assert {key.partition(".")[0] for key in report.reshaped} == {"head", "head_dist"}
    assert all(torch.equal(ours.state_dict()[key], fresh[key]) for key in report.reshaped)
    assert torch.equal(ours.get_parameter(report.matched[0]), theirs.get_parameter(report.matched[0]))
    with pytest.raises(CheckpointError, match=r"set MODEL.NUM_CLASSES to the file's \(5\)"):
        load(path, timm.create_model(name, num_classes=3))


def test_another_image_size_is_named_with_the_flag(path):
    torch.save({"model": tiny_network(img_size=64).state_dict(), "preprocessing": {"img_size": 64}}, path)
    with pytest.raises(CheckpointError, match="images of 64 x 64 pixels, this model for 32 x 32: .*DATA.IMG_SIZE 64"):
        load(path, img_size=32)
