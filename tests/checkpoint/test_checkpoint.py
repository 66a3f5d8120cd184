"""Training state and the store of its files: collected, put back, chosen, rotated, refused."""

import copy
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from utils.checkpoint.capture import FORMAT_VERSION, capture, read_training_state, restore
from utils.checkpoint.files import load_checkpoint, write_checkpoint
from utils.checkpoint.store import BEST, LAST, CheckpointStore
from utils.errors import CheckpointError
from utils.runtime.random_state import random_state, set_random_state
from utils.training.guard import NonFiniteGuard
from utils.training.meters import RunningMeans
from utils.training.state import Progress, TrainState

CPU = torch.device("cpu")
FACTS = {"config": "SEED: 0\n", "classes": ["a", "b"]}
FIXTURES = Path(__file__).parents[1] / "faults" / "fixtures"


def make_state(*, seed: int = 0, width: int = 3, optimizer: str = "adamw", ema: bool = True) -> TrainState:
    """A small state after two updates."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    kinds = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    }
    state = TrainState(
        model=model,
        optimizer=kinds[optimizer](model.parameters()),
        scheduler=None,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        guard=NonFiniteGuard(model, CPU, 5),
        means=RunningMeans(CPU),
        ema=ModelEmaV3(model, decay=0.5) if ema else None,
    )
    state.scheduler = CosineLRScheduler(state.optimizer, t_initial=10, t_in_epochs=False)
    for step in (1, 2):
        state.guard.begin({})
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        state.means.add(loss, loss, state.guard.step_unless_nonfinite(state.optimizer, state.scaler, loss.detach()))
        state.optimizer.zero_grad()
        if ema:
            state.ema.update(model, step=step)
    state.progress = Progress(global_step=2, epoch=0, samples_seen=16, best_acc1=50.0, best_epoch=1)
    return state


def tensors(state: TrainState) -> list[torch.Tensor]:
    entries = state.optimizer.state_dict()["state"].values()
    moments = [value for entry in entries for value in entry.values() if torch.is_tensor(value)]
    averaged = list(state.ema.module.state_dict().values()) if state.ema else []
    return [*state.model.state_dict().values(), *averaged, *moments]


def equal(first: TrainState, second: TrainState) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "state.pth"
    write_checkpoint(path, capture(make_state(), FACTS))
    return path


# the state


@pytest.mark.parametrize("options", ({}, {"optimizer": "sgd", "ema": False}), ids=("adamw, average", "sgd"))
def test_round_trip(tmp_path, options):
    state, other = make_state(**options), make_state(seed=1, **options)
    write_checkpoint(tmp_path / "a.pth", capture(state, FACTS))
    assert not equal(state, other)
    streams = torch.rand(3), random.random(), np.random.random()
    write_checkpoint(tmp_path / "a.pth", capture(state, FACTS))
    expected = torch.rand(3), random.random(), np.random.random()
    restore(other, read_training_state(tmp_path / "a.pth"), tmp_path / "a.pth")
    assert equal(state, other)
    assert other.progress == state.progress
    assert other.means.state() == state.means.state()
    actual = torch.rand(3), random.random(), np.random.random()
    assert torch.equal(actual[0], expected[0])
    assert actual[1:] == expected[1:]
    assert streams[1:] != expected[1:]


def test_random_streams_survive_as_plain_types(tmp_path):
    np.random.seed(5)
    np.random.standard_normal()  # leaves a second Gaussian number waiting
    write_checkpoint(tmp_path / "a.pth", random_state())
    expected = [np.random.standard_normal() for _ in range(3)]
    set_random_state(load_checkpoint(tmp_path / "a.pth"))
    assert [np.random.standard_normal() for _ in range(3)] == expected


def test_allowed_change_of_the_optimizer_takes_effect(saved):
    state = make_state(seed=1)
    for group in state.optimizer.param_groups:
        group.update(weight_decay=0.7, betas=(0.5, 0.6))
    restore(state, read_training_state(saved), saved)
    assert [(g["weight_decay"], g["betas"]) for g in state.optimizer.param_groups] == [(0.7, (0.5, 0.6))]


def test_other_versions_are_logged(saved, caplog):
    payload = read_training_state(saved)
    payload["versions"] |= {"torch": "1.0", "threads": 77}
    with caplog.at_level(logging.WARNING):
        restore(make_state(), payload, saved)
    assert f"saved with torch 1.0, this is {torch.__version__}: the continuation is not exact" in caplog.text
    assert "saved with threads 77" in caplog.text


def edited(payload: dict[str, Any], *keys: Any, value: Any = None, delete: bool = False) -> dict[str, Any]:
    """A copy of a payload with one entry replaced or deleted."""
    payload = copy.deepcopy(payload)
    *parents, last = keys
    node = payload
    for key in parents:
        node = node[key]
    if delete:
        del node[last]
    else:
        node[last] = value
    return payload


NAN = torch.full((3, 4), float("nan"))
REFUSED = {
    "not ours": (("format_version",), {"delete": True}, "not written by this project"),
    "odd version": (("format_version",), {"value": "x"}, "not written by this project"),
    "newer": (("format_version",), {"value": FORMAT_VERSION + 1}, "this code reads up to 1.*update this project"),
    "no config": (("config",), {"delete": True}, "not a complete training state: config missing"),
    "no average entry": (("ema",), {"delete": True}, "not a complete training state: ema"),
    "odd progress": (("progress", "samples_seen"), {"delete": True}, "not a complete training state: progress"),
    "lost rank": (("rank_state",), {"value": []}, "not a complete training state: rank_state"),
    "odd optimizer": (("optimizer",), {"value": {}}, "not a complete training state: optimizer"),
    "missing key": (("model", "0.weight"), {"delete": True}, r"\(1 entries differ\): 0.weight: not in the file"),
    "extra key": (("model", "9.weight"), {"value": NAN}, "9.weight: only in the file"),
    "shape": (("model", "0.weight"), {"value": torch.ones(5, 4)}, r"0.weight: \[5, 4\] in the file, \[3, 4\] here"),
    "shape of the average": (("ema", "0.weight"), {"value": torch.ones(5, 4)}, r"0.weight: \[5, 4\] in the file"),
    "huge": (
        ("model", "0.weight"),
        {"value": torch.zeros(1).expand(10**6, 10**6)},
        r"0.weight: \[1000000, 1000000\] is more",
    ),
    "NaN weights": (("model", "0.weight"), {"value": NAN}, "'0.weight' has infinite or undefined values"),
    "NaN average": (("ema", "0.weight"), {"value": NAN}, "'0.weight' has infinite or undefined values"),
    "no average": (("ema",), {"value": None}, "saved without averaged weights; set TRAIN.EMA_DECAY"),
    "moments": (
        ("optimizer", "state", 0, "exp_avg"),
        {"value": torch.ones(7)},
        r"state.0.exp_avg has shape \[7\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_nothing_changed(tmp_path, saved, name):
    keys, change, message = REFUSED[name]
    path = tmp_path / "edited.pth"
    torch.save(edited(load_checkpoint(saved), *keys, **change), path)
    state, untouched = make_state(seed=1), make_state(seed=1)
    with pytest.raises(CheckpointError, match=message) as error:
        restore(state, read_training_state(path), path)
    assert str(path) in str(error.value)
    assert equal(state, untouched)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"width": 5}, "belongs to another model"),
        ({"optimizer": "sgd"}, "another optimizer; set TRAIN.OPTIMIZER"),
        ({"ema": False}, "saved with averaged weights"),
    ),
    ids=("width", "optimizer", "average"),
)
def test_refused_by_another_run(saved, options, message):
    with pytest.raises(CheckpointError, match=message):
        restore(make_state(**options), read_training_state(saved), saved)


def test_first_format_stays_readable(saved):
    """A file that the first version of the format wrote; it is never made anew."""
    path = FIXTURES / "format1.pth"
    state = make_state(seed=1)
    restore(state, read_training_state(path), path)
    assert state.progress == Progress(global_step=2, epoch=0, samples_seen=16, best_acc1=50.0, best_epoch=1)
    assert state.model[0].weight.sum().item() == pytest.approx(load_checkpoint(path)["model"]["0.weight"].sum().item())
    assert len(state.optimizer.state_dict()["state"]) == 6


# the store


def payload_at(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((50,), float(step))}, "ema": None, "progress": {"global_step": step}}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    folder = tmp_path / "run"
    folder.mkdir()
    return CheckpointStore(folder, keep=2)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def step_name(step: int) -> str:
    return f"checkpoint_step_{step:09d}.pth"


def damage(path: Path) -> None:
    """Damage one name's file only, not the file behind its other names."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-20])


def test_rotation_keeps_best_and_milestones(store):
    for step, extra in ((1, (BEST,)), (2, ("ckpt_epoch_2.pth",)), (3, ()), (4, ())):
        store.save(payload_at(step), extra)
    assert names(store) == sorted([BEST, LAST, "ckpt_epoch_2.pth", step_name(3), step_name(4)])
    steps = {name: load_checkpoint(store.directory / name)["progress"]["global_step"] for name in names(store)}
    assert (steps[BEST], steps["ckpt_epoch_2.pth"], steps[LAST]) == (1, 2, 4)
    assert store.newest() == store.directory / step_name(4)


def test_newest_by_number_not_by_time(store):
    for step in (9, 10):
        store.save(payload_at(step))
    now = (store.directory / step_name(10)).stat().st_mtime
    os.utime(store.directory / step_name(10), (now - 9000, now - 9000))
    os.utime(store.directory / step_name(9), (now + 9000, now + 9000))
    (store.directory / "notes_pth").write_text("no checkpoint")
    (store.directory / "checkpoint_step_999.pth.bak").write_text("no checkpoint")
    assert store.newest() == store.directory / step_name(10)


def test_empty_folder_has_no_checkpoint(store):
    assert store.newest() is None


def test_damaged_newest_is_passed_over(store, caplog):
    for step in (1, 2):
        store.save(payload_at(step))
    damage(store.directory / step_name(2))
    (store.directory / LAST).unlink()
    with caplog.at_level(logging.WARNING):
        assert store.newest() == store.directory / step_name(1)
    assert f"passed over: {store.directory / step_name(2)} is truncated or damaged" in caplog.text


def test_milestone_is_better_than_nothing(store):
    store.save(payload_at(3), ("ckpt_epoch_1.pth",))
    for name in (LAST, step_name(3)):
        damage(store.directory / name)
    assert store.newest() == store.directory / "ckpt_epoch_1.pth"


def test_all_damaged_is_an_error_that_lists_them(store):
    for step in (1, 2):
        store.save(payload_at(step))
    for name in names(store):
        damage(store.directory / name)
    before = {path: path.read_bytes() for path in store.directory.iterdir()}
    with pytest.raises(CheckpointError, match="starting from zero would hide that") as error:
        store.newest()
    for name in (LAST, step_name(1), step_name(2)):
        assert f"{store.directory / name} is truncated or damaged" in str(error.value)
    assert {path: path.read_bytes() for path in store.directory.iterdir()} == before


def test_weights_alone_are_no_state_to_continue(store):
    torch.save({"model": {"w": torch.ones(2)}}, store.directory / LAST)
    with pytest.raises(CheckpointError, match="has no training state"):
        store.newest()


@pytest.mark.parametrize("kind", ("model", "ema"))
def test_nothing_non_finite_is_saved(store, kind):
    store.save(payload_at(1))
    bad = {**payload_at(2), kind: {"w": torch.tensor([1.0, float("inf")])}}
    with pytest.raises(CheckpointError, match=f"is not written: {kind} entry 'w' has infinite"):
        store.save(bad, (BEST,))
    assert names(store) == sorted([LAST, step_name(1)])


def test_failed_save_keeps_the_older_files(store, monkeypatch):
    for step in (1, 2):
        store.save(payload_at(step))
    before = {path: path.read_bytes() for path in store.directory.iterdir()}
    with pytest.raises(CheckpointError, match="asks to import"):
        store.save({**payload_at(3), "x": Path("x")})
    assert {path: path.read_bytes() for path in store.directory.iterdir()} == before


def test_going_back_sets_later_files_aside(store, caplog):
    """--resume of an older file: the abandoned files neither win the next restart nor push out new ones."""
    for step in (10, 20):
        store.save(payload_at(step))
    with caplog.at_level(logging.WARNING):
        store.set_aside_beyond(10)
    assert names(store) == [f"{LAST}.aside", step_name(10), f"{step_name(20)}.aside"]
    assert step_name(20) in caplog.text
    store.save(payload_at(15))
    assert names(store) == sorted([f"{LAST}.aside", step_name(10), f"{step_name(20)}.aside", LAST, step_name(15)])
    assert store.newest() == store.directory / step_name(15)


def test_going_on_sets_nothing_aside(store, caplog, monkeypatch):
    """Nor does it open a file: the last one is another name of the file of update 20."""
    store.set_aside_beyond(0)
    for step in (10, 20):
        store.save(payload_at(step))
    caplog.clear()  # of the saves
    before = names(store)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a file was opened"))
    store.set_aside_beyond(20)
    assert names(store) == before
    assert caplog.text == ""


def test_damaged_newest_is_set_aside(store):
    for step in (10, 20):
        store.save(payload_at(step))
    damage(store.directory / step_name(20))
    damage(store.directory / LAST)
    store.set_aside_beyond(10)
    assert names(store) == [f"{LAST}.aside", step_name(10), f"{step_name(20)}.aside"]
