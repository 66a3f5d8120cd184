"""What a run reports: the rows of metrics.jsonl, and the warning of a run that waits for its data."""

import json
import logging
import math
from pathlib import Path

import pytest

from utils.training.records import append_metrics, curves_figure, read_metrics, trim_metrics, warn_of_data_wait


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three epochs."""
    for epoch in (1, 2, 3):
        append_metrics(tmp_path / "metrics.jsonl", {"epoch": epoch, "train_loss": 1.0 / epoch})
    return tmp_path / "metrics.jsonl"


def test_a_number_that_is_none_is_written_as_null(path: Path) -> None:
    append_metrics(path, {"epoch": 4, "train_loss": math.nan})
    assert json.loads(path.read_text().splitlines()[-1]) == {"epoch": 4, "train_loss": None}


def test_an_unfinished_line_is_ignored(path: Path) -> None:
    path.write_text(path.read_text() + '{"epoch": 4, "tr')
    assert [row["epoch"] for row in read_metrics(path)] == [1, 2, 3]


def test_rows_of_epochs_that_are_repeated_are_dropped(path: Path) -> None:
    trim_metrics(path, 2)
    assert [row["epoch"] for row in read_metrics(path)] == [1, 2]
    trim_metrics(path.with_name("none.jsonl"), 2)
    assert not path.with_name("none.jsonl").exists()


def test_an_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere/metrics\.jsonl"):
        append_metrics(tmp_path / "nowhere" / "metrics.jsonl", {})


def test_waiting_for_data_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_data_wait(0.09, 100.0)  # a small part of the epoch
        warn_of_data_wait(0.5, 3.0)  # a short epoch
        assert not caplog.records
        warn_of_data_wait(0.3, 100.0)
    assert "waited for data 30 % of the epoch (30 s)" in caplog.text
    for remedy in ("DATA.NUM_WORKERS", "DATA.CACHE_DECODED", "DATA.FAST_RESIZE", "docs/PERFORMANCE.md"):
        assert remedy in caplog.text


def test_after_one_epoch_the_axis_has_one_tick() -> None:
    figure = curves_figure({"": [{"epoch": 1, "train_loss": 2.0, "val_loss": 2.0, "lr": 1e-3}]})
    ticks = [tick for axes in figure.axes for tick in axes.xaxis.get_major_locator()()]
    assert all(tick == int(tick) for tick in ticks)
