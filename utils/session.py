"""What surrounds the training state, and where the loop stands in the run."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.checkpoint import CheckpointStore
from utils.runtime import Run, StopRequest, gather_objects
from utils.training import Precision, Progress, TrainState, global_batch_size


@dataclass(frozen=True)
class Session:
    """What the loop needs besides the state; nothing in here survives a crash, the config rebuilds it."""

    config: Any
    run: Run
    precision: Precision
    loader: DataLoader
    val_loader: DataLoader
    transform: Callable[..., tuple[Tensor, Tensor]]
    val_transform: Callable[..., tuple[Tensor, Tensor]]
    criterion: nn.Module
    store: CheckpointStore
    stop: StopRequest
    facts: dict[str, Any]

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop the data workers."""
        self.loader.close()
        self.val_loader.close()

    def count_bad_images(self) -> int:
        """Unreadable training images met so far, over all processes (``DATA.BAD_IMAGES skip``). Collective."""
        return len(set().union(*gather_objects(self.loader.dataset.bad_indices())))

    @property
    def accumulation(self) -> int:
        """Micro-batches an update."""
        return max(1, self.config.TRAIN.ACCUMULATION_STEPS)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates of a whole epoch; the last one may have fewer micro-batches."""
        return math.ceil(self.loader.sampler.batches_per_epoch / self.accumulation)

    def updates_left(self, progress: Progress) -> int:
        """Updates until the end of the run."""
        return self.config.TRAIN.EPOCHS * self.updates_per_epoch - self.updates_done(progress)

    def where(self, progress: Progress) -> str:
        """Place in the run, for messages."""
        in_epoch = self.updates_done(progress) - progress.epoch * self.updates_per_epoch
        return (
            f"epoch {progress.epoch + 1}/{self.config.TRAIN.EPOCHS} update {in_epoch}/{self.updates_per_epoch} "
            f"(step {progress.global_step})"
        )

    def log_due(self, done: int) -> bool:
        """Whether to log: every ``PRINT_FREQ`` updates of an epoch, and after its last."""
        in_epoch = (done - 1) % self.updates_per_epoch + 1
        return in_epoch % self.config.PRINT_FREQ == 0 or in_epoch == self.updates_per_epoch

    def check_due(self, done: int) -> bool:
        """Whether to read the guard's counters, which on a GPU waits for the device."""
        every = 1 if self.run.device.type == "cpu" else min(self.config.PRINT_FREQ, self.config.TRAIN.MAX_NONFINITE)
        return done % every == 0

    def updates_done(self, progress: Progress) -> int:
        """Position in the schedule: updates of completed epochs and of the one in progress.

        Counted from the samples seen, so that the schedule stays in place when a run is resumed with another batch.
        """
        in_epoch = math.ceil(progress.samples_seen / global_batch_size(self.config, self.run.world_size))
        return progress.epoch * self.updates_per_epoch + min(in_epoch, self.updates_per_epoch)


@contextmanager
def located_errors(session: Session, state: TrainState) -> Iterator[None]:
    """Note in an error from inside where the run was, and what it usually means when a data worker is killed.

    PyTorch reports that death wherever the process happens to be, not only where batches are fetched.
    """
    try:
        yield
    except Exception as error:
        place = session.where(state.progress)
        if place not in str(error):
            error.add_note(f"at {place}")
        if "DataLoader worker" in str(error) and "DATA.NUM_WORKERS" not in str(error):
            error.add_note(
                "a data worker that is killed was most likely out of memory (RAM, or /dev/shm in a "
                "container): lower DATA.NUM_WORKERS or DATA.BATCH_SIZE"
            )
        raise


def update_groups(session: Session, state: TrainState) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Yield the epoch's remaining updates as lists of micro-batches, with a bar if somebody watches."""
    batches = iter(session.loader)
    groups = iter(lambda: list(islice(batches, session.accumulation)), [])
    watched = session.run.is_main and sys.stderr.isatty()
    epoch = state.progress.epoch
    done = session.updates_done(state.progress) - epoch * session.updates_per_epoch
    with logging_redirect_tqdm() if watched else nullcontext():
        yield from tqdm(
            groups,
            desc=f"epoch {epoch + 1}",
            initial=done,
            total=session.updates_per_epoch,
            unit="update",
            leave=False,
            disable=not watched,
        )
