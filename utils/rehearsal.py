"""What has to be tried before a run: whether a batch fits the memory, and how long the parts of a run take."""

import gc
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from utils.checkpoint import CheckpointStore, capture, restore
from utils.config import input_shape, read_duration, with_values
from utils.runtime import (
    Run,
    broadcast_object,
    free_memory,
    get_local_world_size,
    on_main_process,
    random_state,
    set_random_state,
)
from utils.session import Batch, Session
from utils.training import (
    Costs,
    EvalResult,
    TimeBudget,
    TrainState,
    UpdateTimer,
    Watcher,
    batch_choices,
    global_batch_size,
    largest_fitting,
    log_batch,
    record_epoch,
    small_enough,
)

logger = logging.getLogger(__name__)

CPU_SHARE = 0.5  # of the free memory that a run on the CPU may take by the estimate: it ends without an error to catch
GPU_SHARE = 0.92  # of a GPU's memory that two updates may take: the rest is for NCCL and for fragments
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)

REHEARSAL_SHARE, REHEARSAL_SECONDS = 0.04, 60.0  # of the time budget, and at most, for measuring updates
WARM_UPDATES, LEAST_UPDATES = 3, 4  # before measuring, and measured; fewer where they take too long:
PATIENCE = 3  # a measurement ends when it has taken so many times as long as it should


@contextmanager
def without_trace() -> Iterator[None]:
    """Run a block without its log lines, and put the random streams and PyTorch's caches back where they were."""
    streams, level = random_state(), logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(level)
        set_random_state(streams)


# memory


def plan_batch(
    config: CfgNode,
    kept: dict[str, Any],
    run: Run,
    num_samples: int,
    *,
    needed: Callable[[CfgNode], int],
    two_updates: Callable[[CfgNode], None],
) -> CfgNode:
    """Return the configuration that the run goes on with; its batch is the largest that fits. Collective.

    Args:
        config: the configuration as given.
        kept: what was planned before and stays (``kept_plan``).
        run: whose processes have to fit.
        num_samples: images of the training set.
        needed, two_updates: see ``fits_memory``.
    """
    if config.TRAIN.GLOBAL_BATCH:
        if "DATA.BATCH_SIZE" not in kept:
            fits = partial(fits_memory, device=run.device, needed=needed, two_updates=two_updates)
            choices = batch_choices(config, run.world_size)
            config = largest_fitting(small_enough(choices, run.world_size, num_samples), fits)
        config = with_values(config, kept)
        log_batch(config, run.world_size, num_samples)
    if read_duration(config.TRAIN.TIME_BUDGET):
        config = with_values(config, {"TRAIN.UPDATES": 0, **kept})
    return config


def fits_memory(
    config: CfgNode, device: torch.device, *, needed: Callable[[CfgNode], int], two_updates: Callable[[CfgNode], None]
) -> bool:
    """Return whether this process can train with the batch of ``config``; it is tried. Not collective.

    On a GPU, two real updates decide. On the CPU the system kills a program that takes too much, so an estimate is
    asked first.

    Args:
        config: a configuration with the batch to try.
        device: where the run computes.
        needed: estimates the bytes that training needs.
        two_updates: builds what trains and does two updates, on this process alone.
    """
    on_gpu, fits = device.type == "cuda", True
    if on_gpu:
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif needed(config) > CPU_SHARE * free_memory() / get_local_world_size():
        return False
    with without_trace():
        try:
            two_updates(config)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not _OUT_OF_MEMORY.search(str(error)):
                raise
            fits = False  # what the error holds is freed when this block is left
    if on_gpu:
        fits = fits and torch.cuda.max_memory_allocated(device) <= GPU_SHARE * memory
    if config.TRAIN.COMPILE:
        torch._dynamo.reset()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return fits


@contextmanager
def group_of_one(rank: int) -> Iterator[dist.ProcessGroup]:
    """Make a process group of this process alone: what happens in it waits for no other."""
    group = dist.new_group([rank], use_local_synchronization=True)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def noise_batches(config: CfgNode, num_classes: int, count: int) -> list[Batch]:
    """Return micro-batches of random images of the shape and type that the loader gives."""
    size, shape = config.DATA.BATCH_SIZE, input_shape(config)
    if config.DATA.PIPELINE == "fast":
        images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8)
    else:
        images = torch.randn(size, *shape)
    batch = images.to(memory_format=torch.channels_last), torch.arange(size) % num_classes, torch.arange(size)
    return [batch] * count


# time


class _Stopwatch:
    """Takes the place of the ``StopRequest`` in a rehearsal: asks for a stop when enough has been measured."""

    save_due = False

    def begin(self, seconds: float, *, least: int = 0, most: float = math.inf) -> None:
        """Begin a measurement of ``seconds`` with at least ``least`` parts, unless these take more than ``most``."""
        self.began, self.polls, self.agreed = time.perf_counter(), 0, ""
        self._seconds, self._least, self._most = seconds, least, most

    @property
    def seconds(self) -> float:
        """Seconds since the measurement began."""
        return time.perf_counter() - self.began

    def poll(self) -> str:
        """Return a text if enough is measured. Collective: rank 0 decides."""
        self.polls += 1
        enough = (self.polls >= self._least and self.seconds >= self._seconds) or self.seconds >= self._most
        self.agreed = "measured" if broadcast_object(enough) else ""
        return self.agreed

    def saved(self) -> None:
        """Do nothing: a rehearsal saves when it wants to."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal(Session):
    """A session whose updates are only timed.

    Attributes:
        firsts: times at which the first update of each pass was done.
    """

    firsts: list[float] = field(default_factory=list)

    def after_update(self, state: TrainState, timer: UpdateTimer, *, lr: float) -> bool:
        """Return whether enough updates were measured; of each pass, the first one is waited for and timed."""
        if state.progress.samples_seen <= global_batch_size(self.config, self.run.world_size):
            _wait_for(self.run.device)
            self.firsts.append(time.perf_counter())
        return bool(self.stop.poll())


def rehearse(
    model: DistributedDataParallel,
    state: TrainState,
    session: Session,
    *,
    train_one_epoch: Callable[[DistributedDataParallel, TrainState, Session], dict[str, Any]],
    validate: Callable[[TrainState, Session], EvalResult | None],
    seconds: float | None = None,
) -> Costs:
    """Measure what the parts of a run take, and put the new ``state`` back as it was, to the bit. Collective.

    A rehearsal is training itself, in a folder that is removed: some updates, then evaluation, records and saving.

    Args:
        model, state: as built; no update was done.
        session: of the run.
        train_one_epoch, validate: of ``main.py``.
        seconds: for measuring updates, and again for the evaluation; None: what the time budget allows.

    Returns:
        What rank 0 measured, on all processes.
    """
    if seconds is None:
        seconds = min(session.budget.seconds * REHEARSAL_SHARE, REHEARSAL_SECONDS)
    before = tree_map(lambda leaf: leaf.detach().cpu().clone() if torch.is_tensor(leaf) else leaf, capture(state, {}))
    with without_trace(), _folder(session.run) as run:
        others = {one.name: getattr(session, one.name) for one in fields(Session)}
        rehearsal = Rehearsal(
            **others
            | {
                "run": run,
                "store": CheckpointStore(run.output_dir, session.config.TRAIN.SAVE_KEEP),
                "stop": _Stopwatch(),
                "watcher": Watcher("none", run.output_dir, is_main=False),
                "budget": TimeBudget(),
            }
        )
        row, update, start = _time_updates(partial(train_one_epoch, model, state, rehearsal), state, rehearsal, seconds)
        evaluation, result = _time_evaluation(partial(validate, state), rehearsal, seconds)
        records = _time_records(run, {"lr": state.learning_rate, **row}, result)
        began = time.perf_counter()
        rehearsal.save(state, background=True)  # what training waits for
        save = time.perf_counter() - began
        rehearsal.store.finish()
    restore(state, before, session.run.output_dir)
    state.guard.history.clear()
    return broadcast_object(Costs(update, row["data_wait"], start + records, evaluation, save))


@contextmanager
def _folder(run: Run) -> Iterator[Run]:
    """Give a rehearsal a folder on the disk of the run; what a killed one left is removed."""
    folder = run.output_dir / ".rehearsal"

    def renew() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    on_main_process(renew)
    try:
        yield replace(run, output_dir=folder)
    finally:
        if run.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _time_updates(
    train: Callable[[], dict[str, Any]], state: TrainState, rehearsal: Rehearsal, seconds: float
) -> tuple[dict[str, Any], float, float]:
    """Return (figures of the last pass, seconds of an update, seconds that the start of an epoch takes besides)."""
    watch, passes = rehearsal.stop, []
    for length, least, most in ((0.0, WARM_UPDATES, seconds), (seconds, LEAST_UPDATES, PATIENCE * seconds)):
        watch.begin(length, least=least, most=most)
        passes.clear()
        while not watch.agreed:
            began, polls = time.perf_counter(), watch.polls
            row = train()
            passes.append(
                (watch.polls - polls, rehearsal.firsts[-1] - began, time.perf_counter() - rehearsal.firsts[-1])
            )
            state.progress.epoch, state.progress.samples_seen = state.progress.epoch + 1, 0
    counts, firsts, others = zip(*passes, strict=True)
    if sum(counts) == len(passes):  # an update is an epoch
        return row, (sum(firsts) + sum(others)) / len(passes), 0.0
    update = sum(others) / (sum(counts) - len(passes))
    return row, update, max(0.0, sum(firsts) / len(passes) - update)


class _Beginning:
    """The first batches of an evaluation loader, as ``evaluate`` takes a loader; it is its own data set.

    Args:
        loader: of this process's share.
        batches: how many, of each process; at most all.
        world_size: number of processes.
    """

    def __init__(self, loader: DataLoader, batches: int, world_size: int) -> None:
        self._loader, self._world_size = loader, world_size
        self.batches = min(batches, len(loader))
        self.dataset, self.classes, self.batch_size = self, loader.dataset.classes, loader.batch_size

    def __len__(self) -> int:
        return min(len(self._loader.dataset), self.batches * self.batch_size * self._world_size)

    def __iter__(self) -> Iterator[Batch]:
        return islice(self._loader, self.batches)


def _time_evaluation(
    validate: Callable[[Session], EvalResult | None], rehearsal: Rehearsal, seconds: float
) -> tuple[float, EvalResult]:
    """Return (seconds of a whole evaluation, result of a part), from one batch, then from as many as fit the time."""
    rehearsal.stop.begin(math.inf)
    batches = 1
    for _ in range(2):
        part = _Beginning(rehearsal.val_loader, batches, rehearsal.run.world_size)
        began = time.perf_counter()
        result = validate(replace(rehearsal, val_loader=part))
        _wait_for(rehearsal.run.device)
        spent = time.perf_counter() - began
        batches = broadcast_object(int(seconds / spent))
        if not batches:
            break
    return spent * len(rehearsal.val_loader) / part.batches, result


def _time_records(run: Run, row: dict[str, Any], result: EvalResult) -> float:
    """Return the seconds that the records of an epoch take, on rank 0."""
    for _ in range(2):  # the first one loads what draws the curves
        began = time.perf_counter()
        if run.is_main:
            record_epoch(run.output_dir, {"epoch": 1, "step": 1, "best_acc1": 0.0, **row}, result)
        seconds = time.perf_counter() - began
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
