"""What surrounds the training state: the parts of a run, and what they do after an update."""

import logging
import math
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from yacs.config import CfgNode

from utils.checkpoint import (
    LAST,
    CheckpointStore,
    Room,
    capture,
    check_continuation,
    read_training_state,
    restore,
    write_dump,
)
from utils.config import normalisation
from utils.errors import NonFiniteError, RunError, one_line
from utils.runtime import Run, StopRequest, gather_objects, load_on_main_process, phase
from utils.training import (
    Precision,
    Progress,
    Teacher,
    TimeBudget,
    TrainState,
    UpdateTimer,
    Watcher,
    global_batch_size,
    log_updates,
)

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0  # the longest time without a log line, if updates take less
_WORKER_DEATH = re.compile("DataLoader worker.*(killed by signal|exited unexpectedly)")

Batch = tuple[Tensor, Tensor, Tensor]  # images (B, C, H, W), targets (B,), sample indices (B,)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How a batch becomes a loss: what ``main.accumulate_gradients`` needs besides the model and the progress."""

    config: CfgNode
    precision: Precision
    transform: Callable[..., tuple[Tensor, Tensor]]
    criterion: nn.Module
    teacher: Teacher | None = None

    def loss(self, scores: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """Return the mean loss of a micro-batch: by its labels, and by its teacher if there is one."""
        loss = self.criterion(scores, targets)
        return loss if self.teacher is None else self.teacher.share(loss, scores, images)

    @property
    def accumulation(self) -> int:
        """Micro-batches per update."""
        return max(1, self.config.TRAIN.ACCUMULATION_STEPS)


class LogClock:
    """Tells when a log line about the updates is due by time: at the first one, then ``LOG_SECONDS`` after each."""

    def __init__(self) -> None:
        self._last = -math.inf

    @property
    def due(self) -> bool:
        """Whether it is time for a line."""
        return time.monotonic() - self._last >= LOG_SECONDS

    def restart(self) -> None:
        """Count from now; call this after every line."""
        self._last = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Session(Objective):
    """What the loop needs besides the state; nothing in here has to survive a crash, the config rebuilds it."""

    run: Run
    loader: DataLoader
    val_loader: DataLoader
    val_transform: Callable[..., tuple[Tensor, Tensor]]
    store: CheckpointStore
    stop: StopRequest
    metadata: dict[str, Any]
    watcher: Watcher
    held_out: Any = None  # data.HeldOut, the images that DATA.HOLDOUT keeps from the training
    log_clock: LogClock = field(default_factory=LogClock)
    budget: TimeBudget = field(default_factory=TimeBudget)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop the data workers, close the logger, and let a checkpoint that is being written become complete."""
        self.watcher.close()
        self.loader.close()
        self.val_loader.close()
        self.store.close()

    # the position in the run

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates per epoch; the last one may have fewer micro-batches."""
        return math.ceil(self.loader.sampler.batches_per_epoch / self.accumulation)

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.config.TRAIN.UPDATES or self.config.TRAIN.EPOCHS * self.updates_per_epoch

    @property
    def epochs(self) -> int:
        """Epochs of the whole run; ``TRAIN.UPDATES`` may cut the last one short."""
        return math.ceil(self.total_updates / self.updates_per_epoch)

    @property
    def schedule_epoch(self) -> float:
        """Updates of what counts as an epoch in the schedule, which ``TRAIN.UPDATES`` stretches."""
        return self.total_updates / self.config.TRAIN.EPOCHS

    def updates_done(self, progress: Progress) -> int:
        """Return the position in the schedule: updates of completed epochs and of the one in progress.

        Counted from the samples seen, so that the schedule stays in place when a run is resumed with another batch.
        """
        in_epoch = math.ceil(progress.samples_seen / global_batch_size(self.config, self.run.world_size))
        done = progress.epoch * self.updates_per_epoch + min(in_epoch, self.updates_per_epoch)
        return min(done, self.total_updates)

    def updates_left(self, progress: Progress) -> int:
        """Return the number of updates until the end of the run."""
        return self.total_updates - self.updates_done(progress)

    def position_text(self, progress: Progress) -> str:
        """Return the position in the run, for messages: the last update that was done."""
        epoch = max(1, math.ceil(self.updates_done(progress) / self.updates_per_epoch))
        in_epoch = self.updates_done(progress) - (epoch - 1) * self.updates_per_epoch
        return f"epoch {epoch}/{self.epochs} update {in_epoch}/{self.updates_per_epoch} (step {progress.global_step})"

    def set_learning_rate(self, state: TrainState) -> None:
        """Set the learning rate of the next update, which is a function of the position alone."""
        done = self.updates_done(state.progress)
        if done:
            state.scheduler.step_update(done - 1)

    # what goes before and follows an update

    def draw_first_batch(self, group: list[Batch], progress: Progress) -> None:
        """Draw the first batch of this process's run as the network is about to see it.

        The transform depends on the samples and the position alone: what is drawn is what training computes again.
        """
        if self.watcher.picture_due:
            images, targets, indices = group[0]
            update = progress.global_step * self.accumulation
            images, targets = self.transform(images.clone(), targets, indices, epoch=progress.epoch, update=update)
            (mean, std), smoothing = normalisation(self.config), self.config.MODEL.LABEL_SMOOTHING
            look = {"smoothing": smoothing, "mean": mean, "std": std}
            self.watcher.batch(images, targets, self.loader.dataset.classes, step=progress.global_step, **look)

    def after_update(self, state: TrainState, timer: UpdateTimer, *, lr: float) -> bool:
        """Check, log and save where that is due. Collective.

        Args:
            state: after the update.
            timer: of the epoch.
            lr: learning rate of the update.

        Returns:
            Whether all processes agreed to stop before the next update; ``stop.agreed`` says why.
        """
        done = self.updates_done(state.progress)
        self.budget.check(done, self.total_updates)
        if self.check_due(done):
            self.check_finite(state)
        if self.log_due(done):
            figures = log_updates(
                self.position_text(state.progress),
                state.means,
                timer,
                lr=lr,
                left=self.updates_left(state.progress),
                device=self.run.device,
            )
            self.watcher.figures("train", figures, state.progress.global_step)
            self.log_clock.restart()
        if self.stop.poll(failed=self.store.failed):
            return True
        if self.stop.failed:
            self.store.finish()
        save_steps = self.config.TRAIN.SAVE_STEPS
        due = self.stop.save_due or (save_steps and state.progress.global_step % save_steps == 0)
        if due and not state.guard.last_skipped():
            self.save(state, background=True)
        return False

    def check_due(self, done: int) -> bool:
        """Return whether to read the guard's counters, which on a GPU waits for the device."""
        every = 1 if self.run.device.type == "cpu" else min(self.config.PRINT_FREQ, self.config.TRAIN.MAX_NONFINITE)
        return done % every == 0

    def check_finite(self, state: TrainState) -> None:
        """Report skipped updates; after too many in a row, end the run with a dump of the last one. Collective.

        Raises:
            NonFiniteError: the message names the dump and the last good checkpoint.
        """
        try:
            state.guard.check(self.position_text(state.progress))
        except NonFiniteError as error:
            self.store.finish()
            folder = self.run.output_dir
            path = write_dump(state, self.metadata, folder, self.loader.dataset.sample_name)
            last = folder / LAST
            raise NonFiniteError(
                f"{error}. The last good checkpoint is {last if last.exists() else 'none yet'}; "
                f"repeat the update with: python tools/replay.py {path}"
            ) from None

    def log_due(self, done: int) -> bool:
        """Return whether to log: the first update, every ``PRINT_FREQ`` of an epoch, its last, and by time."""
        in_epoch = (done - 1) % self.updates_per_epoch + 1
        is_last = in_epoch == self.updates_per_epoch or done == self.total_updates
        return is_last or in_epoch % self.config.PRINT_FREQ == 0 or self.log_clock.due

    # what survives

    def check_free_space(self, state: TrainState) -> None:
        """Refuse to train where not even one checkpoint fits; warn where not all of those that are planned do.

        Rank 0 alone looks, as it is the one that writes.

        Raises:
            RunError: names the folder, what a checkpoint takes and what is free.
        """
        if not self.run.is_main:
            return
        room = Room.of(self.config, self.run.output_dir, state_bytes(state), epochs=self.epochs)
        if not room.fits_one:
            raise RunError(room.problem)
        if room.problem:
            logger.warning("%s", room.problem)

    @phase("saving")
    def save(self, state: TrainState, names: tuple[str, ...] = (), *, background: bool = False) -> Path:
        """Write the state as the newest checkpoint and under ``names``; return its path. Collective.

        ``background``: only copy it; it is written while training goes on. See ``CheckpointStore.save``.
        """
        used = {"seconds_used": self.budget.used} if self.budget.seconds else {}
        path = self.store.save(capture(state, {**self.metadata, **used}), names, background=background)
        self.stop.saved()
        return path

    def resume(self, state: TrainState, path: Path, allowed: Collection[str]) -> None:
        """Continue from a checkpoint. Collective.

        Args:
            state: what to fill.
            path: the checkpoint; only rank 0 reads it, the others need not see it.
            allowed: keys of the recipe that may differ (``--allow-change KEY``).

        Raises:
            CheckpointError: the file is damaged, or belongs to another recipe, data set, model or optimizer.
        """
        payload = load_on_main_process(lambda: read_training_state(path))
        check_continuation(self.config, self.metadata, payload, path, allowed)
        restore(state, payload, path)
        self.budget.continue_from(payload.get("seconds_used", 0.0))
        self.set_learning_rate(state)
        progress = state.progress
        logger.info(
            "resumed from %s: epoch %d, update %d, best top-1 %.2f %%",
            path,
            progress.epoch,
            progress.global_step,
            progress.best_acc1,
        )

    def count_bad_images(self) -> int:
        """Return how many training images could not be read so far (``DATA.BAD_IMAGES skip``). Collective."""
        return len(set().union(*gather_objects(self.loader.dataset.bad_indices())))


@contextmanager
def located_errors(session: Session, state: TrainState) -> Iterator[None]:
    """Note in an error from inside where the run was, and the usual reason if a data worker was killed.

    PyTorch reports that death wherever the process happens to be, not only where batches are fetched.
    """
    try:
        yield
    except Exception as error:
        position = session.position_text(state.progress)
        if _WORKER_DEATH.search(str(error)) and not isinstance(error, RunError):
            with phase(getattr(error, "phase", "training")):
                raise RunError(
                    f"{one_line(error)} A data worker that is killed was most likely out of memory (RAM, or /dev/shm "
                    f"in a container): lower DATA.NUM_WORKERS or DATA.BATCH_SIZE; at {position}"
                ) from error
        if position not in str(error):
            error.add_note(f"at {position}")
        raise


def state_bytes(state: TrainState) -> int:
    """Return about how many bytes a checkpoint of ``state`` takes: weights, averaged weights, optimizer moments."""

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    group = state.optimizer.param_groups[0]
    moments = 2 if "betas" in group else int(group.get("momentum", 0) > 0)
    weights = size(state.model.state_dict().values()) * (1 if state.ema is None else 2)
    return weights + moments * size(state.model.parameters())


def update_groups(session: Session, state: TrainState) -> Iterator[list[Batch]]:
    """Yield the epoch's remaining updates as lists of micro-batches, with a progress bar on a terminal."""
    batches = iter(session.loader)
    groups = iter(lambda: list(islice(batches, session.accumulation)), [])
    if session.config.TRAIN.UPDATES:
        groups = islice(groups, session.updates_left(state.progress))
    watched = session.run.is_main and sys.stderr.isatty()
    epoch = state.progress.epoch
    done = session.updates_done(state.progress) - epoch * session.updates_per_epoch
    with logging_redirect_tqdm() if watched else nullcontext():
        for group in tqdm(
            groups,
            desc=f"epoch {epoch + 1}",
            initial=done,
            total=session.updates_per_epoch,
            unit="update",
            leave=False,
            disable=not watched,
        ):
            session.draw_first_batch(group, state.progress)
            yield group
