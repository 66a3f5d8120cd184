"""The training state of a run: what survives a crash."""

from dataclasses import dataclass, field

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from utils.training.guard import NonFiniteGuard
from utils.training.meters import RunningMeans
from utils.training.optimizer import learning_rate


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        global_step: optimizer updates done, skipped ones included.
        epoch: epochs completed; also the index of the epoch in progress.
        samples_seen: samples of the epoch in progress already used, over all processes.
        best_acc1, best_epoch: best validation accuracy so far in percent, and after which epoch (-1: none yet).
    """

    global_step: int = 0
    epoch: int = 0
    samples_seen: int = 0
    best_acc1: float = -1.0
    best_epoch: int = -1


@dataclass
class TrainState:
    """Everything that survives a crash. The schedule is a function of ``progress`` and has no state of its own."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    guard: NonFiniteGuard
    means: RunningMeans
    ema: ModelEmaV3 | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def eval_model(self) -> nn.Module:
        """Return the model that is evaluated and ranked: the averaged weights where there are any."""
        return self.model if self.ema is None else self.ema.module

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the next update, before what ``TRAIN.LAYER_DECAY`` takes off it."""
        return learning_rate(self.optimizer)
