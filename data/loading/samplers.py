"""The order of the samples: resumable and sharded for training, sharded without padding for evaluation."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from utils.runtime import integer_seed


class TrainSampler(Sampler[tuple[int, int]]):
    """One rank's share of a random order that depends on ``(seed, epoch)`` only.

    The order of an epoch is one permutation of all samples. Consecutive runs of ``batch_size * world_size`` samples
    form the global batches; rank ``r`` takes every ``world_size``-th sample from ``r`` on. The progress is a number of
    samples, not of batches, so an interrupted epoch can be continued with another batch size or number of processes
    and still uses no sample twice.

    With ``repeats`` R, each sample of the permutation is followed by R - 1 further ones of the same image, which other
    ranks take where there are any, and the epoch ends after as many samples as the data set has (repeated augmentation,
    arXiv 1902.05509, as in DeiT and timm). Sample ``index + r * num_samples`` is repetition r of an image.

    With ``balance``, an epoch has as many samples of each class, up to one, and as many of each image of a class, up
    to one; it ends after as many samples as the data set has. It is no permutation then: large classes come in part,
    images of small ones several times, each time as another repetition.

    Args:
        num_samples: size of the data set.
        batch_size: samples per process and batch.
        seed: seed of the run, the same on all ranks.
        rank, world_size: this process and the number of processes.
        repeats: samples per image.
        balance: label of each image, to draw all classes equally often; not with ``repeats``.

    Raises:
        ValueError: a size that is not positive, or a rank outside ``[0, world_size)``.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        balance: np.ndarray | None = None,
    ) -> None:
        if min(num_samples, batch_size, world_size, repeats) < 1 or not 0 <= rank < world_size or seed < 0:
            raise ValueError(
                f"TrainSampler needs positive sizes, a non-negative seed and 0 <= rank < world_size; got num_samples="
                f"{num_samples}, batch_size={batch_size}, seed={seed}, rank={rank}, world_size={world_size}, "
                f"repeats={repeats}"
            )
        self.num_samples = num_samples
        self.global_batch = batch_size * world_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.balance = balance
        self.epoch = 0
        self.samples_seen = 0

    @property
    def batches_per_epoch(self) -> int:
        """Number of whole global batches in an uninterrupted epoch; the samples left over are dropped in that epoch."""
        return self.num_samples // self.global_batch

    def set_progress(self, epoch: int, samples_seen: int = 0) -> None:
        """Choose the epoch, and how many of its samples all ranks together have used already.

        Raises:
            ValueError: a negative epoch, or more samples than the data set has.
        """
        if epoch < 0 or not 0 <= samples_seen <= self.num_samples:
            raise ValueError(
                f"no such progress: epoch {epoch}, {samples_seen} samples seen of {self.num_samples} (the data set "
                "must be the one that the checkpoint was trained on)"
            )
        self.epoch = epoch
        self.samples_seen = samples_seen

    def __len__(self) -> int:
        """Return the number of samples of this rank still to come in the epoch."""
        return (self.num_samples - self.samples_seen) // self.global_batch * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(integer_seed(self.seed, self.epoch))
        if self.balance is None:
            order = torch.randperm(self.num_samples, generator=generator)
            order = (order[:, None] + self.num_samples * torch.arange(self.repeats)).flatten()[: self.num_samples]
        else:
            order = _balanced_order(self.balance, generator)
        remaining = order[self.samples_seen :][: len(self) * self.world_size]
        epoch = self.epoch
        for index in remaining[self.rank :: self.world_size].tolist():
            yield epoch, index


def _balanced_order(targets: np.ndarray, generator: torch.Generator) -> Tensor:
    """Return a random order of as many samples as there are targets, with as many of each class, up to one."""
    labels, total = torch.from_numpy(targets), len(targets)
    classes = labels.unique()
    quotas = torch.full_like(classes, total // len(classes))
    quotas[torch.randperm(len(classes), generator=generator)[: total % len(classes)]] += 1
    chosen = []
    for label, quota in zip(classes, quotas.tolist(), strict=True):
        members = (labels == label).nonzero().flatten()
        rounds = range(math.ceil(quota / len(members)))
        order = [members[torch.randperm(len(members), generator=generator)] + r * total for r in rounds]
        chosen += [part[: quota - r * len(members)] for r, part in zip(rounds, order, strict=True)]
    samples = torch.cat(chosen)
    return samples[torch.randperm(total, generator=generator)]


class EvalShardSampler(Sampler[int]):
    """Every ``world_size``-th sample from ``rank`` on: all ranks together see each sample once, without padding."""

    def __init__(self, num_samples: int, *, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside [0, {world_size})")
        self._indices = range(rank, num_samples, world_size)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)
