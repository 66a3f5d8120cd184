"""Means and pace of an epoch."""

import math
from collections.abc import Iterator

import pytest
import torch

from utils.training.meters import RunningMeans, UpdateTimer

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
