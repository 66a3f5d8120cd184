"""The learning rate: how it follows from config and number of processes, and how it changes with every update."""

import math
from dataclasses import dataclass

from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer
from yacs.config import CfgNode

REFERENCE_BATCH = 512  # images per update that TRAIN.LR_SCALING refers to
LINEAR_FLOOR = 0.01  # the linear schedule ends at this fraction of the base rate, as published


@dataclass(frozen=True)
class LearningRates:
    """Rates of a run: after warm-up (base), at its start (warmup) and at the end of the run (minimum)."""

    base: float
    warmup: float
    minimum: float


def global_batch_size(config: CfgNode, world_size: int) -> int:
    """Return the images per update: batch per process x processes x accumulation steps."""
    return config.DATA.BATCH_SIZE * world_size * max(1, config.TRAIN.ACCUMULATION_STEPS)


def scaled_learning_rates(config: CfgNode, world_size: int) -> LearningRates:
    """Return the rates under ``TRAIN.LR_SCALING``.

    ``none`` takes the config's rates as written, as the published run does; ``linear`` and ``sqrt`` multiply all three
    by (images per update / 512) or its square root.
    """
    share = global_batch_size(config, world_size) / REFERENCE_BATCH
    factor = {"none": 1.0, "linear": share, "sqrt": math.sqrt(share)}[config.TRAIN.LR_SCALING]
    train = config.TRAIN
    return LearningRates(train.BASE_LR * factor, train.WARMUP_LR * factor, train.MIN_LR * factor)


def build_scheduler(config: CfgNode, optimizer: Optimizer, lrs: LearningRates, updates_per_epoch: float) -> Scheduler:
    """Build the schedule of ``TRAIN.LR_SCHEDULER``; it moves with every update (timm, ``t_in_epochs=False``).

    After update k (counted from 0) the caller calls ``step_update(k)``. Update k therefore runs at the rate set after
    update k-1, and update 0 at the warm-up rate, as published. Without ``WARMUP_PREFIX`` the cosine counts from update
    0, so that the rate drops a little where warm-up ends (the published behaviour); with it the decay starts at the end
    of warm-up. ``updates_per_epoch`` is not a whole number where ``TRAIN.UPDATES`` stretches the schedule.

    Raises:
        ValueError: the schedule's name is unknown.
    """
    options = config.TRAIN.LR_SCHEDULER
    total = round(config.TRAIN.EPOCHS * updates_per_epoch)
    warmup = min(round(config.TRAIN.WARMUP_EPOCHS * updates_per_epoch), total - 1)
    common = {"warmup_t": warmup, "warmup_lr_init": lrs.warmup if warmup else lrs.base, "t_in_epochs": False}
    prefix = options.WARMUP_PREFIX
    name = options.NAME.lower()
    if name == "cosine":
        return CosineLRScheduler(
            optimizer,
            t_initial=total - warmup if prefix else total,
            lr_min=lrs.minimum,
            cycle_limit=1,
            warmup_prefix=prefix,
            **common,
        )
    if name == "linear":
        return PolyLRScheduler(
            optimizer,
            t_initial=max(1, total - warmup),
            power=1.0,
            cycle_limit=1,
            lr_min=lrs.base * LINEAR_FLOOR,
            warmup_prefix=True,
            **common,
        )
    if name == "step":
        return StepLRScheduler(
            optimizer,
            decay_t=max(1, round(options.DECAY_EPOCHS * updates_per_epoch)),
            decay_rate=options.DECAY_RATE,
            warmup_prefix=prefix,
            **common,
        )
    raise ValueError(f"TRAIN.LR_SCHEDULER.NAME is {options.NAME!r}; known: cosine, linear, step")
