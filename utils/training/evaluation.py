"""Exact evaluation, and throughput."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from utils.errors import NonFiniteError
from utils.runtime import all_reduce_sum, get_world_size

POLL_BATCHES = 20  # batches between two calls of should_stop


@dataclass(frozen=True)
class EvalResult:
    """Accuracy in percent, mean cross-entropy in nats, and the number of samples they are taken over.

    ``balanced_acc1`` is the mean over the classes of the share of their samples that is right (recall, top-1); classes
    without samples are left out.
    """

    acc1: float
    acc5: float
    loss: float
    num_samples: int
    balanced_acc1: float


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    batch_transform: Callable[..., tuple[Tensor, Tensor]],
    should_stop: Callable[[], str] | None = None,
    columns: Sequence[int] | None = None,
    flip: bool = False,
    observe: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> EvalResult | None:
    """Evaluate on the shards of all processes; every sample counts once, whatever the number of processes. Collective.

    Hits are summed as integers and losses in float64, over all processes, and divided once. Top-5 counts the best
    min(5, classes) scores.

    Args:
        model: the bare model (no DDP wrapper, whose collectives would meet uneven shards); its mode is restored.
        loader: yields (images, targets, indices) of this process's shard.
        device: where to compute.
        autocast: makes the context of the forward pass.
        batch_transform: ``data.build_batch_transform(..., is_train=False)``.
        should_stop: asked every ``POLL_BATCHES`` batches; collective, with the same answer on all processes.
        columns: the score of each label, where the data set holds a part of the classes; the others are left out.
        flip: also score the mirror images; see ``class_scores``.
        observe: called for each batch of this process with scores (B, classes), targets (B,) and sample indices (B,).

    Returns:
        The result, the same on all processes; None if ``should_stop`` ended the evaluation.

    Raises:
        NonFiniteError, RuntimeError: a score is not finite; not every sample was evaluated exactly once.
    """
    num_samples = len(loader.dataset)
    # Shards differ by at most one sample: every process has this many batches, so all ask the same number of times.
    common_batches = num_samples // get_world_size() // loader.batch_size
    counts = torch.zeros(2, len(loader.dataset.classes) + 1, dtype=torch.int64, device=device)  # see _count
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    with _evaluation_mode(model):
        for number, (images, targets, indices) in enumerate(loader):
            if should_stop and number < common_batches and number % POLL_BATCHES == 0 and should_stop():
                return None
            images, targets = batch_transform(images, targets, indices, epoch=0, update=0)
            logits = class_scores(model, images, autocast=autocast, columns=columns, flip=flip)
            _count(logits, targets, counts)
            loss_sum += F.cross_entropy(logits, targets, reduction="none").double().sum()
            if observe is not None:
                observe(logits, targets, indices)
    return _summarise(counts, loss_sum, num_samples)


def class_scores(
    model: nn.Module,
    images: Tensor,
    *,
    autocast: Callable[[], AbstractContextManager],
    columns: Sequence[int] | None = None,
    flip: bool = False,
) -> Tensor:
    """Return the float32 scores (B, classes) of ``images`` (B, C, H, W); for ``columns`` see ``evaluate``.

    With ``flip`` they are log-probabilities: the logarithm of the mean of the softmax of an image and of its mirror
    image, as Krizhevsky et al. (2012) and Simonyan and Zisserman (2015) average over crops and mirror images.
    """
    with autocast():
        logits = model(images)
    logits = (logits if columns is None else logits[:, columns]).float()
    if not flip:
        return logits
    mirrored = class_scores(model, images.flip(-1), autocast=autocast, columns=columns)
    return torch.logaddexp(logits.log_softmax(dim=1), mirrored.log_softmax(dim=1)) - math.log(2.0)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _count(logits: Tensor, targets: Tensor, counts: Tensor) -> None:
    """Add a batch to ``counts``: for each class top-1 hits and samples; at the end top-5 hits and non-finite scores."""
    top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    bad = ~torch.isfinite(logits).all(dim=1)
    counts.index_add_(1, targets, torch.stack([top5[:, 0], torch.ones_like(bad)]).long())
    counts[:, -1] += torch.stack([top5.sum(), bad.sum()])


def _summarise(counts: Tensor, loss_sum: Tensor, num_samples: int) -> EvalResult:
    """Add up the counts (see ``_count``) and losses of all processes and divide once."""
    all_reduce_sum(counts)
    all_reduce_sum(loss_sum)
    counts = counts.double().cpu()
    (hits, samples), (hits5, bad) = counts[:, :-1], counts[:, -1].tolist()
    hits1, seen = int(hits.sum()), int(samples.sum())
    if seen != num_samples:
        raise RuntimeError(f"evaluated {seen} samples, but the data set has {num_samples}")
    if bad:
        raise NonFiniteError(f"evaluation: the model's scores are not finite for {bad:.0f} of {num_samples} samples")
    balanced = 100.0 * float((hits / samples)[samples > 0].mean())
    return EvalResult(100.0 * hits1 / seen, 100.0 * hits5 / seen, float(loss_sum) / seen, seen, balanced)


@torch.inference_mode()
def measure_throughput(
    model: nn.Module,
    images: Tensor,
    *,
    autocast: Callable[[], AbstractContextManager],
    seconds: float = 10.0,
) -> float:
    """Return the images per second of the forward pass on one fixed batch: the median over repetitions after warm-up.

    Args:
        model: in evaluation mode.
        images: (B, C, H, W) on the model's device.
        autocast: makes the context of the forward pass.
        seconds: how long to measure; at least five repetitions are made.
    """

    def run_once() -> float:
        start = time.perf_counter()
        with autocast():
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start

    for _ in range(10 if images.is_cuda else 2):
        run_once()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        times.append(run_once())
    return len(images) / sorted(times)[len(times) // 2]
