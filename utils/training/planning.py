"""The arithmetic of plans: from images per update to batch and accumulation, from time to a number of updates.

Here is what follows from numbers. What has to be tried or measured, memory and speed, is in ``utils.rehearsal``.
"""

import bisect
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yacs.config import CfgNode

from utils.config import mixes, with_values
from utils.errors import RunError
from utils.runtime import gather_objects

logger = logging.getLogger(__name__)

MAX_BATCH = 65536  # of DATA.BATCH_SIZE
USED_SHARE = 0.98  # of the time budget that is planned; the rest is for a run a little slower than it was measured
CHECKS = 10  # of the predicted end, over the run


def batch_choices(config: CfgNode, world_size: int) -> list[CfgNode]:
    """Return the configurations that make an update of ``TRAIN.GLOBAL_BATCH`` images, from the largest batch down.

    Each batch per process divides its share of the update, and is at most half of the one before it. Without
    ``TRAIN.GLOBAL_BATCH``, the configuration is the only choice.

    Raises:
        ValueError: the images of an update cannot be divided; the nearest numbers that can are named.
    """
    total = config.TRAIN.GLOBAL_BATCH
    if not total:
        return [config]
    pair = 2 if mixes(config) else 1
    unit = world_size * pair
    if total % unit:
        lower = total // unit * unit
        nearest = f"{lower} or {lower + unit}" if lower else str(unit)
        pairs = " with an even batch each, as mixup and cutmix pair images" if pair == 2 else ""
        raise ValueError(
            f"TRAIN.GLOBAL_BATCH is {total} and cannot be divided among {world_size} process(es){pairs}; take {nearest}"
        )
    share, choices, limit = total // world_size, [], MAX_BATCH
    while limit >= pair:
        steps = next((n for n in range(math.ceil(share / limit), share + 1) if share % (n * pair) == 0), 0)
        if not steps:
            break
        if share // steps == 1 and choices:  # BatchNorm has nothing to normalise by
            break
        choices.append(with_values(config, {"DATA.BATCH_SIZE": share // steps, "TRAIN.ACCUMULATION_STEPS": steps}))
        limit = share // steps // 2
    return choices


def small_enough(choices: Sequence[CfgNode], world_size: int, num_samples: int) -> list[CfgNode]:
    """Return those of ``choices`` whose batches of all processes do not take more images than the data set has.

    Raises:
        ValueError: the data set has fewer images than an update.
    """
    total = choices[0].TRAIN.GLOBAL_BATCH
    if total > num_samples:
        raise ValueError(f"TRAIN.GLOBAL_BATCH is {total}, but there are {num_samples} training images; take fewer")
    return [choice for choice in choices if choice.DATA.BATCH_SIZE * world_size <= num_samples]


def log_batch(config: CfgNode, world_size: int, num_samples: int) -> None:
    """Log the batch that follows from ``TRAIN.GLOBAL_BATCH``, and what is not as with one batch of so many images."""
    total, batch, steps = config.TRAIN.GLOBAL_BATCH, config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS
    logger.info("TRAIN.GLOBAL_BATCH %d: %d per process and forward pass, accumulation %d", total, batch, steps)
    together = batch * world_size
    rest = num_samples // together % steps * together
    differences = [
        f"BatchNorm normalises over {together if config.TRAIN.SYNC_BN else batch} images" if batch < total else "",
        f"mixup and cutmix are drawn for every {batch}" if batch < total and mixes(config) else "",
        f"the last update of an epoch has {rest}" if rest else "",
    ]
    if any(differences):
        logger.info("not as with one batch of %d images: %s", total, "; ".join(filter(None, differences)))


def largest_fitting(choices: Sequence[CfgNode], fits: Callable[[CfgNode], bool]) -> CfgNode:
    """Return the first of ``choices`` that fits on every process. Collective.

    Each process tries for itself, so that one that runs out of memory leaves no other waiting.

    Raises:
        RunError: on a process, none fits.
    """
    number = next((number for number, choice in enumerate(choices) if fits(choice)), len(choices))
    number = max(gather_objects(number))
    if number == len(choices):
        raise RunError(
            f"TRAIN.GLOBAL_BATCH {choices[-1].TRAIN.GLOBAL_BATCH}: not even a DATA.BATCH_SIZE of "
            f"{choices[-1].DATA.BATCH_SIZE} fits the memory; take a smaller model or image, TRAIN.USE_CHECKPOINT True, "
            "or more memory"
        )
    return choices[number]


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a run take.

    Attributes:
        update: an update, with waiting for its data.
        data_wait: share of that in which the device waits for data.
        epoch: what an epoch takes besides: the start of its data, its records.
        evaluation, save: one of each.
    """

    update: float
    data_wait: float
    epoch: float
    evaluation: float
    save: float

    def of_run(self, config: CfgNode, updates: int, updates_per_epoch: int) -> float:
        """Return the seconds of a run of ``updates`` updates, all its evaluations and saves included."""
        train, epochs = config.TRAIN, math.ceil(updates / updates_per_epoch)
        saves = epochs + (updates // train.SAVE_STEPS if train.SAVE_STEPS else 0)
        seconds = updates * self.update + epochs * self.epoch + saves * self.save
        seconds += math.ceil(epochs / config.TEST.INTERVAL) * self.evaluation
        return seconds * (1 + (self.save / (60 * train.SAVE_MINUTES) if train.SAVE_MINUTES else 0))

    def of_rest(self, config: CfgNode, updates: int, updates_per_epoch: int, *, done: int) -> float:
        """Return the seconds that a run of ``updates`` updates still takes after ``done`` of them."""
        in_epoch = done % updates_per_epoch
        before = self.of_run(config, done - in_epoch, updates_per_epoch) + in_epoch * self.update
        return self.of_run(config, updates, updates_per_epoch) - before


def updates_within(
    seconds: float, costs: Costs, config: CfgNode, updates_per_epoch: int, *, done: int = 0
) -> tuple[int, float]:
    """Return (updates of the whole run that fit into ``seconds`` from now on, seconds that they take).

    Args:
        seconds: from now to the end of the run.
        costs: of its parts.
        config: when it evaluates and saves.
        updates_per_epoch: updates of a whole epoch.
        done: updates done before.

    Raises:
        ValueError: not one update fits.
    """

    def needed(updates: int) -> float:
        return costs.of_rest(config, updates, updates_per_epoch, done=done)

    most = done + max(0, math.ceil(seconds / costs.update))
    updates = done + bisect.bisect_right(range(done + 1, most + 1), seconds, key=needed)
    if updates == done:
        raise ValueError(
            f"TRAIN.TIME_BUDGET is {config.TRAIN.TIME_BUDGET}, of which {max(0.0, seconds):.0f} s are left, but one "
            f"update with evaluation and saving takes {needed(done + 1):.0f} s; give more time"
        )
    return updates, needed(updates)


def plan_length(config: CfgNode, costs: Costs, budget: "TimeBudget", updates_per_epoch: int, *, done: int) -> CfgNode:
    """Return the configuration with as many ``TRAIN.UPDATES`` as the budget allows, and log how that comes about.

    Args:
        config: when the run evaluates and saves.
        costs: of its parts.
        budget: its clock.
        updates_per_epoch: updates of a whole epoch.
        done: updates done before.

    Raises:
        ValueError: not one update fits.
    """
    used = budget.used
    updates, seconds = updates_within(budget.left, costs, config, updates_per_epoch, done=done)
    logger.info(
        "time budget %s: an update takes %.4f s (%.0f %% of it waiting for data), start and records of an epoch %.2f "
        "s, an evaluation %.2f s, a save %.2f s",
        config.TRAIN.TIME_BUDGET,
        costs.update,
        100 * costs.data_wait,
        costs.epoch,
        costs.evaluation,
        costs.save,
    )
    logger.info(
        "time budget %s: %.0f s are used; %d updates (%.1f epochs) are planned, which take %.0f s from now on",
        config.TRAIN.TIME_BUDGET,
        used,
        updates,
        updates / updates_per_epoch,
        seconds,
    )
    return with_values(config, {"TRAIN.UPDATES": updates})


class TimeBudget:
    """The clock of a run: the time that it has used, over restarts, and whether its budget will do.

    Args:
        seconds: the budget; 0 for none.
        started: when this process began with the run, by ``time.monotonic``; None for now.
    """

    def __init__(self, seconds: float = 0.0, started: float | None = None) -> None:
        self.seconds = seconds
        self._started = time.monotonic() if started is None else started
        self._first: tuple[float, int] | None = None  # seconds and updates at the first check
        self._tenth = -1

    @property
    def used(self) -> float:
        """Seconds that the run has taken so far."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds that may still be planned."""
        return self.seconds * USED_SHARE - self.used

    def continue_from(self, seconds: float) -> None:
        """Add the ``seconds`` that the run had used when it was interrupted."""
        self._started -= seconds

    def check(self, done: int, total: int) -> None:
        """Warn if the run is going to end after its budget; call this after every update, it looks at times only.

        Args:
            done, total: updates so far and of the whole run.
        """
        tenth = done * CHECKS // total
        if not self.seconds or tenth == self._tenth:
            return
        self._tenth = tenth
        if self._first is None:
            self._first = (self.used, done)
            return
        seconds, updates = self._first
        end = self.used + (total - done) * (self.used - seconds) / (done - updates)
        if end > self.seconds:
            logger.warning(
                "time budget: at this speed the run ends after %.0f s, later than its budget of %.0f s. The plan of %d "
                "updates stays, as the schedule belongs to it; TRAIN.MAX_RUN_MINUTES would stop the run before its end",
                end,
                self.seconds,
                total,
            )
