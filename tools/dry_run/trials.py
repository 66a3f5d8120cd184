"""Short trials of a run: the loop of main.py itself, timed for seconds instead of logged and saved."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import count, cycle, islice
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from data import ImageLoader
from main import train_one_epoch, validate
from utils.session import Batch, Session
from utils.training import Pace, Progress, TrainState, UpdateTimer

WARM_UPDATES = {"cpu": 1, "cuda": 3}  # before the timed ones


class Stretch:
    """The timed part of a loop: it begins after ``warm`` rounds, and takes ``seconds`` and at least one round.

    A loop whose first rounds take that long already is timed from its start.
    """

    def __init__(self, seconds: float, warm: int) -> None:
        self._seconds, self._warm = seconds, warm
        self._rounds, self._begun = 0, time.monotonic()

    def after_round(self) -> str:
        """Return ``start`` or ``end`` where the timed part does so with this round, else an empty text."""
        self._rounds += 1
        now = time.monotonic()
        if now - self._begun >= self._seconds:
            return "end"
        if self._rounds == self._warm:
            self._begun = now
            return "start"
        return ""


class Stream:
    """Stands in for a training loader, and never ends: one epoch after another, or the same batches again and again."""

    def __init__(self, loader: ImageLoader, repeated: Iterable[Batch] = ()) -> None:
        self._loader, self._repeated = loader, list(repeated)
        self.dataset, self.sampler = loader.dataset, self
        self.batches_per_epoch = loader.sampler.batches_per_epoch

    def set_progress(self, epoch: int, samples_seen: int = 0) -> None:
        """Choose where the first epoch begins."""
        self._loader.sampler.set_progress(epoch, samples_seen)

    def __iter__(self) -> Iterator[Batch]:
        if self._repeated:
            yield from cycle(self._repeated)
        for epoch in count(self._loader.sampler.epoch + 1):
            yield from self._loader
            self.set_progress(epoch)


@dataclass(frozen=True, kw_only=True)
class Trial(Session):
    """A session whose updates are timed, and neither drawn, logged nor saved."""

    stretch: Stretch
    paces: list[Pace]

    def draw_first_batch(self, group: list[Batch], progress: Progress) -> None:
        """Draw nothing."""

    def after_update(self, state: TrainState, timer: UpdateTimer, *, lr: float) -> bool:
        """Return whether the trial is over; its pace is in ``paces`` then."""
        mark = self.stretch.after_round()
        if mark:
            state.means.lap()  # waits for the device
            self.paces[:] = [timer.lap()]
        return mark == "end"


def time_updates(
    model: DistributedDataParallel, state: TrainState, session: Session, stream: Stream, seconds: float
) -> Pace:
    """Train on a stream for some seconds, from the position of ``state``; return the pace. The position stays."""
    position = replace(state.progress)
    parts: dict[str, Any] = {part.name: getattr(session, part.name) for part in fields(session)}
    stretch = Stretch(seconds, WARM_UPDATES[session.run.device.type])
    trial = Trial(**{**parts, "loader": stream}, stretch=stretch, paces=[])
    try:
        train_one_epoch(model, state, trial)
    finally:
        state.progress = position
    return trial.paces[0]


def time_loader(loader: ImageLoader, seconds: float) -> float:
    """Return the images per second that a training loader gives if nothing else is done.

    The batches that its workers have ready at the start do not count.
    """
    stretch = Stretch(seconds, max(1, loader.num_workers * (loader.prefetch_factor or 0)))
    images, begun = 0, time.perf_counter()
    for batch, _, _ in Stream(loader):
        images += len(batch)
        mark = stretch.after_round()
        if mark == "start":
            images, begun = 0, time.perf_counter()
        if mark == "end":
            break
    return images / (time.perf_counter() - begun)


class _Beginning:
    """The first batches of an evaluation loader, as ``evaluate`` takes a loader; it is its own data set."""

    def __init__(self, loader: ImageLoader, batches: int) -> None:
        self._loader, self._batches = loader, batches
        self.dataset, self.classes, self.batch_size = self, loader.dataset.classes, loader.batch_size

    def __len__(self) -> int:
        return min(len(self._loader.dataset), self._batches * self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return islice(self._loader, self._batches)


def time_evaluation(state: TrainState, session: Session, seconds: float) -> float:
    """Return the images per second of the evaluation: on one batch, then on as many as fit into some seconds."""
    rate, batches = 0.0, 1
    for _ in range(2):
        part = _Beginning(session.val_loader, batches)
        begun = time.perf_counter()
        validate(state, replace(session, val_loader=part))
        spent = time.perf_counter() - begun
        rate = len(part) / spent
        if spent >= seconds:
            break
        batches = max(1, int(seconds / spent))
    return rate
