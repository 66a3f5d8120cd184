"""An update does no more than it must: fused, one reduction, no waiting for the device."""

import math
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import main
from tests.tiny_run import TinyRun
from utils.config.cli import parse
from utils.runtime.signals import StopRequest
from utils.runtime.start import start_run
from utils.session import Session
from utils.training import parallel
from utils.training.meters import RunningMeans
from utils.training.state import TrainState

ROOT = Path(__file__).parents[2]
# The CPU saves the work of samples that DropPath drops; elsewhere the host does not look at the draw.
ON_THE_CPU_ALONE = {"models/fast/blocks.py:add_residual_of_kept"}


@contextmanager
def training(tiny: TinyRun, *words: object, tag: str) -> Iterator[tuple[Session, DistributedDataParallel, TrainState]]:
    """A run that is about to train its first epoch."""
    _, config = parse(tiny.argv(*words, tag=tag))
    with start_run(config) as run, StopRequest() as stop:
        session = main.build_session(config, run, stop, update=main.update)
        yield session, *main.build_training(session)


def count_reductions(model: DistributedDataParallel) -> list[int]:
    """Return a list that grows by the memory address of each bucket of gradients that DDP reduces."""
    reduced: list[int] = []

    def hook(_state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.buffer().untyped_storage().data_ptr())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, hook)
    return reduced


@pytest.mark.parametrize(("format_", "world", "hooks"), (("none", 2, 0), ("bf16", 1, 0), ("bf16", 2, 1)))
def test_gradients_are_compressed_where_they_are_exchanged(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, format_: str, world: int, hooks: int
) -> None:
    registered: list[object] = []
    monkeypatch.setattr(parallel, "get_world_size", lambda: world)
    monkeypatch.setattr(
        DistributedDataParallel, "register_comm_hook", lambda _model, _state, hook: registered.append(hook)
    )
    with training(tiny, "--opts", "TRAIN.GRAD_COMPRESSION", format_, tag=f"{format_}_{world}"):
        assert registered == [bf16_compress_hook] * hooks


@pytest.mark.parametrize("name", ("adamw", "sgd"))
def test_the_optimizer_is_fused(tiny: TinyRun, name: str) -> None:
    with training(tiny, "--opts", "TRAIN.OPTIMIZER.NAME", name, tag=name) as (_, _, state):
        assert all(group["fused"] for group in state.optimizer.param_groups)


def test_gradients_lie_in_the_buckets_that_are_reduced(tiny: TinyRun) -> None:
    with training(tiny, tag="views") as (session, model, state):
        reduced = count_reductions(model)
        session.loader.sampler.set_progress(0)
        main.accumulate_gradients(model, [next(iter(session.loader))], state.progress, session)
        addresses = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
    assert addresses == set(reduced)


@pytest.mark.parametrize("steps", (1, 3))
def test_one_reduction_per_update_however_many_micro_batches(tiny: TinyRun, steps: int) -> None:
    with training(tiny, "--accumulation-steps", steps, tag=f"reduce{steps}") as (session, model, state):
        reduced = count_reductions(model)
        main.train_one_epoch(model, state, session)
    assert state.progress.global_step == 6 // steps  # 24 images in batches of 4
    assert len(reduced) == state.progress.global_step  # the tiny model is one bucket


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


@pytest.mark.parametrize("limit", (0.01, 0.0), ids=("clipped", "not clipped"))
def test_gradients_are_clipped(tiny: TinyRun, limit: float) -> None:
    """One update of plain SGD moves the weights by the rate times the norm of the gradient."""
    sgd = ("TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.MOMENTUM", 0.0, "TRAIN.WEIGHT_DECAY", 0.0)
    words = ("--accumulation-steps", 6, "--opts", *sgd, "TRAIN.CLIP_GRAD", limit)
    with training(tiny, *words, tag=f"clip{limit}") as (session, model, state):
        lr, before = state.optimizer.param_groups[0]["lr"], flat(state.model)
        row = main.train_one_epoch(model, state, session)
        moved = float((flat(state.model) - before).norm())
    assert row["grad_norm"] > 0.1
    assert moved == pytest.approx(lr * (limit or row["grad_norm"]), rel=1e-2)


def test_the_average_moves_with_every_update(tiny: TinyRun) -> None:
    """The first update starts it (timm); from then on it keeps three quarters of what it was."""
    words = ("--accumulation-steps", 6, "--opts", "TRAIN.EMA_DECAY", 0.75, "TRAIN.EMA_WARMUP", False)
    with training(tiny, *words, tag="average") as (session, model, state):
        main.train_one_epoch(model, state, session)
        first = flat(state.model)
        assert torch.equal(flat(state.ema.module), first)
        state.progress.epoch, state.progress.samples_seen = 1, 0
        main.train_one_epoch(model, state, session)
        torch.testing.assert_close(flat(state.ema.module), 0.75 * first + 0.25 * flat(state.model))


def test_the_rate_follows_the_schedule(tiny: TinyRun) -> None:
    with training(tiny, "--opts", "TRAIN.MIN_LR", 0.0, tag="rate") as (session, model, state):
        main.train_one_epoch(model, state, session)
        rate = state.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(1e-3 * (1 + math.cos(math.pi * 5 / 12)) / 2)  # set after the sixth of twelve updates


class HostReads(TorchDispatchMode):
    """Notes where the host asks for a value that a device would have to finish first."""

    METHODS = ("tolist", "numpy", "cpu", "__array__")  # of a CPU tensor these run no operation that could be seen

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        for name in self.METHODS:
            monkeypatch.setattr(torch.Tensor, name, self._noting(getattr(torch.Tensor, name)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self._note()
        return func(*args, **(kwargs or {}))

    def _noting(self, method):
        def noting(*args, **kwargs):
            self._note()
            return method(*args, **kwargs)

        return noting

    def _note(self) -> None:
        files = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        ours = [frame for frame in files if "site-packages" not in frame.filename]  # an environment may lie inside
        inner = next(frame for frame in reversed(ours) if frame.filename != __file__)
        self.places[f"{Path(inner.filename).relative_to(ROOT)}:{inner.name}"] += 1


def nothing_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no log line and no check be due, nor what ends an epoch: there the host may wait."""
    monkeypatch.setattr(Session, "check_due", lambda *_: False)
    monkeypatch.setattr(Session, "log_due", lambda *_: False)
    monkeypatch.setattr(Session, "check_finite", lambda *_: None)
    monkeypatch.setattr(RunningMeans, "reduced", lambda *_: (0.0, 0.0))


TUNING = ("TRAIN.LAYER_DECAY", 0.7, "TRAIN.FREEZE", "stages1", "TRAIN.LOSS.NAME", "bce", "AUG.REPEATS", 2)


@pytest.mark.parametrize(("amp", "opts"), (("off", ()), ("fp16", ()), ("off", TUNING)), ids=("off", "fp16", "tuning"))
def test_no_host_reads_between_two_log_lines(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, amp: str, opts: tuple
) -> None:
    """Six updates, with what a GPU would do: no log line is due, and the guard's counters are not."""
    nothing_due(monkeypatch)
    words = ("--amp", amp, "--opts", "TRAIN.EMA_DECAY", 0.9, *opts)
    with (
        training(tiny, *words, tag=f"reads_{amp}_{len(opts)}") as (session, model, state),
        HostReads(monkeypatch) as reads,
    ):
        main.train_one_epoch(model, state, session)
        assert state.progress.global_step == 6
    data = {place for place in reads.places if place.startswith("data/")}  # the loader's tensors are on the host
    assert data
    drawn = {place for place in reads.places if place.startswith("utils/training/pictures.py")}  # the first batch alone
    assert set(reads.places) - data - drawn <= ON_THE_CPU_ALONE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; with one: CUDA_VISIBLE_DEVICES=0 python -m pytest")
@pytest.mark.parametrize("amp", ("off", "bf16", "fp16"))
def test_the_gpu_is_never_waited_for(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, amp: str) -> None:
    nothing_due(monkeypatch)
    words = ("--amp", amp, "--opts", "TRAIN.EMA_DECAY", 0.9)
    with training(tiny, *words, tag=f"sync_{amp}") as (session, model, state):
        main.train_one_epoch(model, state, session)  # the optimizer makes its state
        state.progress.epoch, state.progress.samples_seen = 1, 0
        torch.cuda.set_sync_debug_mode("error")
        try:
            main.train_one_epoch(model, state, session)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_save_restarts_the_clock_of_the_next(tiny: TinyRun) -> None:
    with training(tiny, tag="clock") as (session, _, state):
        session.stop.save_due = True
        path = session.save(state, ("extra.pth",))
        assert not session.stop.save_due
        assert path.samefile(path.with_name("extra.pth"))


def test_a_log_line_is_due_every_so_many_updates_and_after_the_last_of_an_epoch(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training(tiny, "--opts", "PRINT_FREQ", 4, tag="due") as (session, _, _):
        assert session.updates_per_epoch == 6
        assert session.log_due(1)  # the first update of a run is a sign of life
        session.log_clock.restart()
        assert [done for done in range(1, 13) if session.log_due(done)] == [4, 6, 10, 12]
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 31)  # updates that take long are logged by time
        assert session.log_due(2)
