"""What a run shows while it goes on: the first batch, and the logger; neither changes or stops training."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from inference import open_checkpoint
from tests.tiny_run import TinyRun
from tools import show_batch
from utils.training import Watcher, draw_batch, watching


def test_the_first_batch_of_a_run_is_drawn_and_is_what_the_tool_draws(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    folder = run.train("--opts", "TRAIN.EPOCHS", "1")
    target = tmp_path / "batch.png"
    words = [str(run.cfg), "--data-path", str(run.data), "--output", str(target)]
    assert show_batch.command(words) == 0
    with Image.open(folder / "batch.png") as theirs, Image.open(target) as ours:
        assert theirs.tobytes() == ours.tobytes()


def test_names_that_do_not_print_and_long_names_are_drawn() -> None:
    names = ["line\nbreak\x1b[31m", "$<b>" * 100, "犬"]
    targets = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    assert draw_batch(torch.zeros(2, 3, 8, 8), targets, names).size == (280, 174)
    assert draw_batch(torch.zeros(1, 3, 300, 300), torch.tensor([0]), ["alone"]).width == 144


def test_a_logger_that_fails_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watcher = Watcher("tensorboard", tmp_path / "file" / "run", is_main=True)
    (tmp_path / "file").write_text("in the way")
    watcher.start(0, "")
    watcher.figures("train", {"loss": 1.0}, 1)
    watcher.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_failing_logger_and_a_failing_picture_leave_the_run_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TinyRun(tmp_path)
    drawn = run.train("--opts", "TRAIN.EPOCHS", "1", tag="drawn")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(watching, "draw_batch", fail)
    monkeypatch.setattr(watching, "_open", fail)
    failed = run.train("--opts", "TRAIN.EPOCHS", "1", "LOGGER", "tensorboard", tag="failed")
    assert (drawn / "batch.png").is_file()
    assert not (failed / "batch.png").exists()
    log = (failed / "log_rank0.txt").read_text()
    assert log.count("batch.png could not be written: broken") == log.count("LOGGER tensorboard is off: broken") == 1
    first, second = (open_checkpoint(folder / "checkpoint_last.pth").model.state_dict() for folder in (drawn, failed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_batch_that_cannot_be_drawn_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watcher = Watcher("none", tmp_path / "missing", is_main=True)
    watcher.batch(torch.zeros(1, 3, 8, 8), torch.tensor([0]), ["a"], smoothing=0.0, step=0)
    assert "batch.png could not be written" in caplog.text
    assert not watcher.picture_due


def test_the_curves_go_on_after_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, values in ((0, (1.0, 2.0, 3.0)), (1, (20.0, 30.0))):  # the second start goes on after update 1
        watcher = Watcher("tensorboard", tmp_path, is_main=True)
        watcher.start(step, "")
        for number, value in enumerate(values, step + 1):
            watcher.figures("train", {"loss": value}, number)
        watcher.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0), (3, 30.0)]
