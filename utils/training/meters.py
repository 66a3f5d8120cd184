"""Means and pace of an epoch: sums kept on the device, times kept on the host."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.runtime import all_reduce_sum

T = TypeVar("T")


class RunningMeans:
    """Means of the training loss and the gradient norm over the finite updates, accumulated on the device.

    Args:
        device: where the summands live.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, gradient norm, updates
        self._lap = [0.0, 0.0, 0.0]

    def add(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """Add one update; ``skipped`` (a boolean on the device) leaves it out."""
        row = torch.stack(
            [
                loss.detach().double(),
                grad_norm.detach().double(),
                torch.ones((), dtype=torch.float64, device=loss.device),
            ]
        )
        self._sums += torch.where(skipped, 0.0, row)

    def lap(self) -> tuple[float, float]:
        """Return (loss, gradient norm) since the last call, NaN if every update was skipped; waits for the device."""
        sums = self.state()
        loss, norm, count = (now - then for now, then in zip(sums, self._lap, strict=True))
        self._lap = sums
        return (loss / count, norm / count) if count else (math.nan, math.nan)

    def reduced(self) -> tuple[float, float]:
        """Return (loss, gradient norm) over all updates and processes, NaN if all were skipped. Collective."""
        loss, norm, count = all_reduce_sum(self._sums.clone()).tolist()
        return (loss / count, norm / count) if count else (math.nan, math.nan)

    def state(self) -> list[float]:
        """Return the sums, for a checkpoint."""
        return self._sums.tolist()

    def load(self, sums: list[float]) -> None:
        """Continue from the sums that ``state`` returned."""
        self._sums = torch.tensor(sums, dtype=torch.float64, device=self._sums.device)
        self._lap = list(sums)


@dataclass(frozen=True)
class Pace:
    """Speed over a stretch of the loop.

    Attributes:
        images_per_second: over all processes.
        wait_share: fraction of the time that this process's device waited for data.
        seconds, updates: length of the stretch.
    """

    images_per_second: float
    wait_share: float
    seconds: float
    updates: int


class UpdateTimer:
    """Splits the time of the training loop into waiting for data and computing.

    On the CPU, waiting is the time that fetching a batch takes. A GPU computes while the host fetches: there, waiting
    is the time in which it has nothing to do, measured by its own events and read where the host waits for it anyway.

    Args:
        device: the one that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._fetches: list[tuple[Any, Any]] = []  # marks before and after, of those not yet summed up
        self._done = [time.perf_counter(), 0.0, 0, 0]  # time, seconds waited, images, updates
        self._start = self._lap = list(self._done)

    def fetched(self, groups: Iterable[T]) -> Iterator[T]:
        """Yield what ``groups`` yields; the time in which it makes the next one counts as waiting for data."""
        iterator = iter(groups)
        while True:
            before = self._mark()
            try:
                group = next(iterator)
            except StopIteration:
                return
            self._fetches.append((before, self._mark()))
            yield group

    def update_done(self, images: int) -> None:
        """Count an update on ``images`` images, over all processes; it may still run on the device."""
        self._done[2] += images
        self._done[3] += 1

    def lap(self) -> Pace:
        """Return the pace since the last call of this method; waits for the device."""
        since, self._lap = self._lap, self._until_now()
        return self._pace(since, self._lap)

    def total(self) -> Pace:
        """Return the pace since the timer was made; waits for the device."""
        return self._pace(self._start, self._until_now())

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _until_now(self) -> list[float]:
        for before, after in self._fetches:
            if self._on_gpu:
                after.synchronize()
            self._done[1] += before.elapsed_time(after) / 1000 if self._on_gpu else after - before
        self._fetches.clear()
        self._done[0] = time.perf_counter()
        return list(self._done)

    @staticmethod
    def _pace(since: list[float], until: list[float]) -> Pace:
        seconds, waited, images, updates = (now - then for now, then in zip(until, since, strict=True))
        return Pace(images / max(seconds, 1e-9), waited / max(seconds, 1e-9), seconds, int(updates))


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of the GPU's allocator, or on the CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # POSIX only, as the process groups of this project are

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
