"""A checkpoint that is written while training goes on: the same file, the same order, and errors that are heard."""

import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.checkpoint.test_checkpoint import FACTS, make_state, payload_at, tensors
from utils.checkpoint import store as store_module
from utils.checkpoint.capture import capture, host_copy
from utils.checkpoint.files import load_checkpoint, verify_checkpoint, write_checkpoint
from utils.checkpoint.store import BEST, LAST, CheckpointStore
from utils.errors import CheckpointError
from utils.training.state import TrainState

MILESTONE = "ckpt_epoch_1.pth"


def at(update: int) -> TrainState:
    """A state after ``update`` updates, as far as its file tells."""
    state = make_state(seed=update)
    state.progress.global_step = update
    return state


def new_store(folder: Path, keep: int = 2) -> CheckpointStore:
    folder.mkdir(exist_ok=True)
    return CheckpointStore(folder, keep)


def step_file(folder: Path, update: int) -> Path:
    return folder / f"checkpoint_step_{update:09d}.pth"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing begins when this event is set."""
    event = threading.Event()

    def waiting(*args: Any) -> None:
        assert event.wait(60)
        write_checkpoint(*args)

    monkeypatch.setattr(store_module, "write_checkpoint", waiting)
    yield event
    event.set()


def test_the_file_is_that_of_the_moment_of_the_save(tmp_path: Path, gate: threading.Event) -> None:
    """Byte for byte what a save in place writes, though training has changed every tensor in the meantime."""
    state, stores = at(3), [new_store(tmp_path / name) for name in ("place", "background")]
    state.model.append(nn.Linear(2, 2))  # two names for one tensor, and strides of its own
    state.model[-1].weight = state.model[2].weight
    state.model[0].weight = nn.Parameter(state.model[0].weight.detach().t().contiguous().t())
    later = stores[1].save(capture(state, FACTS), (BEST,), background=True)
    gate.set()
    now = stores[0].save(capture(state, FACTS), (BEST,))
    gate.clear()
    stores[1].finish()
    assert now.read_bytes() == later.read_bytes()

    later = stores[1].save({**capture(state, FACTS), "progress": {"global_step": 4}}, background=True)
    with torch.no_grad():
        for tensor in tensors(state):
            tensor.zero_()
    state.optimizer.param_groups[0]["lr"] = 0.0
    assert not later.exists()
    gate.set()
    stores[1].finish()
    before, after = load_checkpoint(now), load_checkpoint(later)
    assert torch.equal(before["model"]["0.weight"], after["model"]["0.weight"])
    assert before["optimizer"]["param_groups"] == after["optimizer"]["param_groups"]
    moments = before["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, after["optimizer"]["state"][0]["exp_avg"])
    assert moments.any()


def test_a_copy_shares_memory_with_nothing_but_itself() -> None:
    whole = torch.arange(6.0)
    tree = {"a": whole[:4], "b": [whole[2:], (torch.empty(0), 7, "text")], "c": whole.view(2, 3).t()}
    copy = host_copy(tree)
    whole.zero_()
    assert copy["a"].tolist() == [0, 1, 2, 3]
    assert copy["c"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copy["c"].stride() == (1, 3)
    assert copy["b"][1][1:] == (7, "text")
    copy["b"][0][0] = 9
    assert copy["a"].tolist() == [0, 1, 9, 3]


def test_the_next_save_waits_and_files_stay_in_order(tmp_path: Path, gate: threading.Event) -> None:
    store = new_store(tmp_path / "run")
    first = store.save(capture(at(1), FACTS), (BEST,), background=True)
    assert not first.exists()
    threading.Timer(0.1, gate.set).start()
    second = store.save(capture(at(2), FACTS), background=True)
    assert first.exists()
    third = store.save(capture(at(3), FACTS))
    assert third.exists()
    assert second.exists()
    assert not first.exists()
    assert (tmp_path / "run" / LAST).samefile(third)
    assert load_checkpoint(tmp_path / "run" / BEST)["progress"]["global_step"] == 1


def test_an_error_is_raised_by_the_next_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = new_store(tmp_path / "run")
    state = at(2)
    state.model[0].weight.data[0, 0] = torch.nan

    def fail() -> None:
        assert not store.failed
        store.save(capture(state, FACTS), (BEST,), background=True)
        deadline = time.monotonic() + 60
        while not store.failed:
            assert time.monotonic() < deadline

    store.save(capture(at(1), FACTS))
    for hear in (store.finish, lambda: store.save(capture(at(3), FACTS))):
        fail()
        with pytest.raises(CheckpointError, match="step_000000002.pth is not written: model entry '0.weight'"):
            hear()
        assert not store.failed
    fail()
    with caplog.at_level(logging.ERROR):
        store.close()  # another error ends the run
    assert "step_000000002.pth is not written" in caplog.text
    store.finish()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [LAST, step_file(Path(), 1).name]


def test_an_end_that_waits_for_the_file_says_so(
    tmp_path: Path, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    store = new_store(tmp_path / "run")
    store.save(capture(at(2), FACTS), background=True)
    end = threading.Thread(target=store.close)
    end.start()
    deadline = time.monotonic() + 60
    while not caplog.messages:
        assert time.monotonic() < deadline
    gate.set()
    end.join()
    said = f"the end waits until a checkpoint is written to {tmp_path / 'run'}"
    assert caplog.messages[0] == said
    store.close()
    assert caplog.messages.count(said) == 1


def killed_child(action: Callable[[], Any], number: int) -> bool:
    """Run ``action`` in a fork that is killed before file operation ``number`` of the writing; whether it came to it.

    The operations are those that Python announces to audit hooks: open, rename, link, remove.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def strike(event: str, _arguments: tuple) -> None:
            nonlocal count
            if (
                event in ("open", "os.rename", "os.link", "os.remove")
                and "checkpoint" in threading.current_thread().name
            ):
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        try:
            sys.addaudithook(strike)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_a_kill_before_every_file_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the write in the background had come to: no damaged file has a name, and a restart loses none."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes half of the time, and a killed process needs none
    payloads = [payload_at(update) for update in (1, 2, 3, 4)]
    before = new_store(tmp_path / "before")
    before.save(payloads[0], (BEST,))
    before.save(payloads[1])
    found, number = [], 0
    while True:
        folder = tmp_path / str(number)
        shutil.copytree(before.directory, folder, copy_function=os.link)
        store = new_store(folder)

        def write(store: CheckpointStore = store) -> None:
            store.save(payloads[2], (BEST, MILESTONE), background=True)
            store.finish()

        killed = killed_child(write, number)
        for path in folder.glob("*.pth"):
            verify_checkpoint(path)
        newest = store.newest()
        found.append(load_checkpoint(newest)["progress"]["global_step"])
        best = load_checkpoint(folder / BEST)["progress"]["global_step"]
        assert best == (3 if found[-1] == 3 else 1)
        assert (folder / MILESTONE).exists() == (found[-1] == 3)
        assert (folder / LAST).samefile(newest)
        store.save(payloads[3])
        assert load_checkpoint(store.newest())["progress"]["global_step"] == 4
        if not killed:
            break
        number += 1
    assert number > 20  # operations: the file, its three further names, the removal of the oldest
    assert found == sorted(found)
    assert set(found) == {2, 3}
