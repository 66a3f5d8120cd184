"""What a run reports: sums kept on the device, times kept on the host, one JSON object an epoch, curves."""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.runtime.distributed import all_reduce_sum

logger = logging.getLogger(__name__)

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
        """Return (loss, gradient norm) since the last call, NaN if all updates were skipped; waits for the device."""
        sums = self.state()
        loss, norm, count = (now - then for now, then in zip(sums, self._lap, strict=True))
        self._lap = sums
        return (loss / count, norm / count) if count else (math.nan, math.nan)

    def reduced(self) -> tuple[float, float]:
        """Return (loss, gradient norm) over all updates and processes; NaN if all were skipped. Collective."""
        loss, norm, count = all_reduce_sum(self._sums.clone()).tolist()
        return (loss / count, norm / count) if count else (math.nan, math.nan)

    def state(self) -> list[float]:
        """The sums, for a checkpoint."""
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
        wait_share: share of the time, 0 to 1, that this process's device waited for data.
        seconds, steps: length of the stretch.
    """

    images_per_second: float
    wait_share: float
    seconds: float
    steps: int


class StepTimer:
    """Splits the time of the training loop into waiting for data and computing.

    On the CPU waiting is the time that fetching a batch takes. A GPU works on while the host fetches: there it is the
    time that the GPU has nothing left to do meanwhile, measured by its own events and read where the host waits anyway.

    Args:
        device: which one computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._fetches: list[tuple[Any, Any]] = []  # marks before and after, of those not yet summed up
        self._done = [time.perf_counter(), 0.0, 0, 0]  # time, seconds waited, images, steps
        self._start = self._lap = list(self._done)

    def fetched(self, groups: Iterable[T]) -> Iterator[T]:
        """Pass on what ``groups`` yields; while it makes the next one, the loop waits for data."""
        iterator = iter(groups)
        while True:
            before = self._mark()
            try:
                group = next(iterator)
            except StopIteration:
                return
            self._fetches.append((before, self._mark()))
            yield group

    def step_done(self, images: int) -> None:
        """Call when the step on ``images`` images (over all processes) has been launched."""
        self._done[2] += images
        self._done[3] += 1

    def lap(self) -> Pace:
        """Pace since the last call of this method; waits for the device."""
        since, self._lap = self._lap, self._until_now()
        return self._pace(since, self._lap)

    def total(self) -> Pace:
        """Pace since the timer was made; waits for the device."""
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
        seconds, waited, images, steps = (now - then for now, then in zip(until, since, strict=True))
        return Pace(images / max(seconds, 1e-9), waited / max(seconds, 1e-9), seconds, int(steps))


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: of the GPU's allocator, or on the CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # POSIX only, like the process groups this project runs on

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def log_step(where: str, means: RunningMeans, timer: StepTimer, *, lr: float, left: int, device: torch.device) -> None:
    """Log one line about the updates since the last one.

    Args:
        where: place in the run.
        means, timer: of the epoch; their laps are taken.
        lr: learning rate of the newest update.
        left: updates until the end of the run, for the estimated time.
        device: for the memory.
    """
    loss, grad_norm = means.lap()  # waits for the device, so that the times below are true
    pace = timer.lap()
    remaining = timedelta(seconds=round(left * pace.seconds / max(pace.steps, 1)))
    logger.info(
        "%s loss %.4f lr %.3e grad_norm %.3f %.1f images/s data_wait %.0f %% memory %.0f MiB eta %s",
        where,
        loss,
        lr,
        grad_norm,
        pace.images_per_second,
        100 * pace.wait_share,
        peak_memory_mib(device),
        remaining,
    )


def epoch_row(means: RunningMeans, timer: StepTimer, *, device: torch.device) -> dict[str, float]:
    """Row of an epoch's training for ``metrics.jsonl``; loss and norm are means over all processes (collective)."""
    loss, grad_norm = means.reduced()
    pace = timer.total()
    return {
        "train_loss": loss,
        "grad_norm": grad_norm,
        "images_per_second": pace.images_per_second,
        "data_wait": pace.wait_share,
        "memory_mib": peak_memory_mib(device),
        "seconds": pace.seconds,
    }


def record_epoch(directory: Path, row: dict[str, Any], result: Any | None) -> None:
    """Append an epoch to ``metrics.jsonl``, redraw ``curves.png`` and log it.

    Args:
        directory: output folder.
        row: the epoch's number (from 1), training figures and best accuracy.
        result: an ``EvalResult``, or None if the epoch was not evaluated.
    """
    if result is not None:
        row = {
            **row,
            "val_loss": result.loss,
            "val_acc1": result.acc1,
            "val_acc5": result.acc5,
            "val_samples": result.num_samples,
        }
        logger.info(
            "epoch %d: train loss %.4f, validation loss %.4f, top-1 %.2f %%, top-5 %.2f %% of %d samples; best "
            "top-1 %.2f %%",
            row["epoch"],
            row["train_loss"],
            result.loss,
            result.acc1,
            result.acc5,
            result.num_samples,
            row["best_acc1"],
        )
    append_metrics(directory / "metrics.jsonl", row)
    plot_curves(read_metrics(directory / "metrics.jsonl"), directory / "curves.png")


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object as a line; NaN becomes null, for strict readers.

    Raises:
        OSError: the line could not be written; names ``path``.
    """
    clean = {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; an unfinished last line, left by a killed process, is ignored."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def trim_metrics(path: Path, epochs: int) -> None:
    """Keep the rows of the first ``epochs`` epochs, so that a resumed run does not report an epoch twice."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["epoch"] <= epochs]
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by a file with ``text``; readers see the old or the new one, never a part.

    Raises:
        OSError: the text could not be written; names ``path``.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs of ``rows`` into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("loss (nats)", {"training objective": "train_loss", "validation cross-entropy": "val_loss"}),
        ("validation accuracy (%)", {"top-1": "val_acc1", "top-5": "val_acc5"}),
        ("learning rate", {"": "lr"}),
    )
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for label, key in lines.items():
            points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label or None, marker="." if len(points) < 40 else None)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(lines) > 1 and axes.lines:
            axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)
