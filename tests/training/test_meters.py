"""Means and pace of an epoch, and the warning of a run that waits for its data."""

import logging
import math
from collections.abc import Iterator

import pytest
import torch

from utils.training.meters import RunningMeans, UpdateTimer
from utils.training.records import warn_of_data_wait

CPU = torch.device("cpu")


def test_waiting_is_the_time_of_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("utils.training.meters.time.perf_counter", lambda: clock[0])

    def slow() -> Iterator[int]:
        for number in range(3):
            clock[0] += 1.0
            yield number

    timer = UpdateTimer(CPU)
    for _ in timer.fetched(slow()):
        clock[0] += 3.0
        timer.update_done(8)
        clock[0] += 1.0  # a log line, a checkpoint: not the data's fault
    pace = timer.total()
    assert (pace.seconds, pace.updates, pace.images_per_second) == (15.0, 3, 24 / 15)
    assert pace.wait_share == pytest.approx(3 / 15)


def test_means_leave_out_skipped_updates() -> None:
    means = RunningMeans(CPU)
    for loss, norm, skipped in ((1.0, 10.0, False), (math.nan, math.inf, True), (3.0, 30.0, False)):
        means.add(torch.tensor(loss), torch.tensor(norm), torch.tensor(skipped))
    assert means.lap() == means.reduced() == (2.0, 20.0)
    means.add(torch.tensor(math.nan), torch.tensor(math.nan), torch.tensor(True))
    assert all(map(math.isnan, means.lap()))  # nothing but a skipped update since the last call
    assert means.reduced() == (2.0, 20.0)


def test_means_continue_from_a_checkpoint() -> None:
    first, second = RunningMeans(CPU), RunningMeans(CPU)
    first.add(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(False))
    second.load(first.state())
    second.add(torch.tensor(3.0), torch.tensor(4.0), torch.tensor(False))
    assert second.lap() == (3.0, 4.0)
    assert second.reduced() == (2.0, 3.0)


def test_waiting_for_data_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_data_wait(0.09, 100.0)  # a small part of the epoch
        warn_of_data_wait(0.5, 3.0)  # a short epoch
        assert not caplog.records
        warn_of_data_wait(0.3, 100.0)
    assert "waited for data 30 % of the epoch (30 s)" in caplog.text
    for remedy in ("DATA.NUM_WORKERS", "DATA.CACHE_DECODED", "DATA.FAST_RESIZE", "docs/PERFORMANCE.md"):
        assert remedy in caplog.text
