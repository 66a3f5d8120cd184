"""The training step does no more than it must: fused, reduced once an update, without waiting for the device."""

import json
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import main
from tests.tiny_run import TinyRun
from utils.checkpoint.files import load_checkpoint
from utils.config import load_config
from utils.config.cli import parse
from utils.runtime.signals import StopRequest
from utils.runtime.start import start_run
from utils.session import Session
from utils.training import data_wait
from utils.training.data_wait import DataWatch, LoaderLoad, advice
from utils.training.meters import StepTimer
from utils.training.state import TrainState

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# The CPU saves the work of samples that DropPath drops; elsewhere the host does not look at the draw.
ON_THE_CPU_ALONE = {"models/layers.py:add_residual"}
# nobody needs these to train; each takes up to seconds to import
HEAVY = ("matplotlib", "sklearn", "scipy", "pandas", "onnx", "onnxruntime", "tensorboard", "IPython", "tools", "tests")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("tiny"))


@contextmanager
def training(tiny: TinyRun, *words: object, tag: str) -> Iterator[tuple[Session, DistributedDataParallel, TrainState]]:
    """A run that is about to train its first epoch."""
    _, config = parse(tiny.argv(*words, tag=tag))
    with start_run(config) as run, StopRequest() as stop:
        session = main.build_session(config, run, stop)
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


@pytest.mark.parametrize("name", ("adamw", "sgd"))
def test_the_optimizer_is_fused(tiny: TinyRun, name: str) -> None:
    with training(tiny, "--opts", "TRAIN.OPTIMIZER.NAME", name, tag=name) as (_, _, state):
        assert all(group["fused"] for group in state.optimizer.param_groups)


def test_gradients_lie_in_the_buckets_that_are_reduced(tiny: TinyRun) -> None:
    with training(tiny, tag="views") as (session, model, state):
        reduced = count_reductions(model)
        session.loader.sampler.set_progress(0)
        main.accumulate_gradients(model, [next(iter(session.loader))], state, session)
        addresses = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
    assert addresses == set(reduced)


@pytest.mark.parametrize("steps", (1, 3))
def test_one_reduction_an_update_however_many_micro_batches(tiny: TinyRun, steps: int) -> None:
    with training(tiny, "--accumulation-steps", steps, tag=f"reduce{steps}") as (session, model, state):
        reduced = count_reductions(model)
        main.train_one_epoch(model, state, session)
    assert state.progress.global_step == 6 // steps  # 24 images in batches of 4
    assert len(reduced) == state.progress.global_step  # the tiny model is one bucket


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


@pytest.mark.parametrize("amp", ("off", "fp16"))
def test_no_host_reads_between_two_log_lines(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, amp: str) -> None:
    """Six updates, with what a GPU would do: no log line is due, and the guard's counters are not."""
    monkeypatch.setattr(Session, "check_due", lambda *_: False)
    monkeypatch.setattr(Session, "log_due", lambda *_: False)
    monkeypatch.setattr(main, "check_finite", lambda *_: None)  # at the end of the epoch
    monkeypatch.setattr(main, "epoch_row", lambda *_, **__: {"data_wait": 0.0, "seconds": 0.0})
    words = ("--amp", amp, "--opts", "TRAIN.EMA_DECAY", 0.9)
    with training(tiny, *words, tag=f"reads_{amp}") as (session, model, state), HostReads(monkeypatch) as reads:
        main.train_one_epoch(model, state, session)
        assert state.progress.global_step == 6
    data = {place for place in reads.places if place.startswith("data/")}  # the loader's tensors are on the host
    assert data
    assert set(reads.places) - data <= ON_THE_CPU_ALONE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; with one: CUDA_VISIBLE_DEVICES=0 python -m pytest")
@pytest.mark.parametrize("amp", ("off", "bf16", "fp16"))
def test_the_gpu_is_never_waited_for(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, amp: str) -> None:
    monkeypatch.setattr(Session, "check_due", lambda *_: False)
    monkeypatch.setattr(Session, "log_due", lambda *_: False)
    monkeypatch.setattr(main, "check_finite", lambda *_: None)
    monkeypatch.setattr(main, "epoch_row", lambda *_, **__: {"data_wait": 0.0, "seconds": 0.0})
    words = ("--amp", amp, "--opts", "TRAIN.EMA_DECAY", 0.9)
    with training(tiny, *words, tag=f"sync_{amp}") as (session, model, state):
        main.train_one_epoch(model, state, session)  # the optimizer makes its state
        state.progress.epoch, state.progress.samples_seen = 1, 0
        torch.cuda.set_sync_debug_mode("error")
        try:
            main.train_one_epoch(model, state, session)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_starting_imports_nothing_heavy() -> None:
    program = f"import sys, main; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_compiled_training(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """One graph a stage for training and one for evaluation, all made before the first update; clean checkpoints."""
    compile_in_place = nn.Module.compile  # the default backend takes minutes on a CPU; graphs are cut before it comes
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_in_place(self, backend="aot_eager", **how))
    train_one_epoch, graphs = main.train_one_epoch, []

    def counting(*args):
        graphs.append(counters["stats"]["unique_graphs"])
        return train_one_epoch(*args)

    monkeypatch.setattr(main, "train_one_epoch", counting)
    counters.clear()
    words = ("--opts", "MODEL.STRIP_MLP.LAYERS", "[1, 1, 2, 1]", "MODEL.DROP_PATH_RATE", 0.0)
    plain = tiny.train(*words, tag="plain")
    assert graphs == [0, 0]
    compiled = tiny.train(*words, "TRAIN.COMPILE", True, tag="compiled")
    assert graphs[2:] == [8, 8]
    assert counters["stats"]["unique_graphs"] == 8  # the last, smaller batch of the evaluation ran as it is
    assert not counters["graph_break"]
    assert "compiled and warmed up in" in capsys.readouterr().out
    keys = [list(load_checkpoint(folder / "checkpoint_last.pth")["model"]) for folder in (plain, compiled)]
    assert keys[0] == keys[1]
    losses = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for folder in (plain, compiled)]
    assert losses[0]["train_loss"] == pytest.approx(losses[1]["train_loss"], rel=1e-3)


def test_waiting_is_the_time_of_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("utils.training.records.time.perf_counter", lambda: clock[0])

    def slow() -> Iterator[int]:
        for number in range(3):
            clock[0] += 1.0
            yield number

    timer = StepTimer(CPU)
    for _ in timer.fetched(slow()):
        clock[0] += 3.0
        timer.step_done(8)
        clock[0] += 1.0  # a log line, a checkpoint: not the data's fault
    pace = timer.total()
    assert (pace.seconds, pace.steps, pace.images_per_second) == (15.0, 3, 24 / 15)
    assert pace.wait_share == pytest.approx(3 / 15)


def watched(config, monkeypatch: pytest.MonkeyPatch, *, wait_share: float, computing: float, queueing: float = 0.0):
    """Report an epoch of 100 seconds with two workers that computed and queued for these shares of it."""
    times = iter([(0.0, 0.0), (200 * computing, 200 * queueing)])
    monkeypatch.setattr(data_wait, "worker_times", lambda: next(times))
    clock = iter([0.0, 100.0])
    monkeypatch.setattr(data_wait.time, "monotonic", lambda: next(clock))
    DataWatch(config, 2).report(wait_share, 100.0)


def test_waiting_for_data_is_reported_with_its_cause(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(tiny.cfg)
    watched(config, monkeypatch, wait_share=0.09, computing=1.0)
    assert not caplog.records
    watched(config, monkeypatch, wait_share=0.3, computing=0.9)
    assert "waited for data 30 % of the epoch (30 s)" in caplog.text
    assert "processor is the limit" in caplog.text
    assert "DATA.FAST_RESIZE" in caplog.text
    caplog.clear()
    watched(config, monkeypatch, wait_share=0.3, computing=0.2)
    assert "reading is the limit" in caplog.text
    caplog.clear()
    watched(config, monkeypatch, wait_share=0.3, computing=0.4, queueing=0.5)
    assert "waits for a core 50 %" in caplog.text


def test_a_short_wait_is_not_worth_a_word(tiny: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    DataWatch(load_config(tiny.cfg), 0).report(0.5, 3.0)
    assert not caplog.records


def test_advice_names_what_is_left_to_try(tiny: TinyRun) -> None:
    config = load_config(tiny.cfg)
    assert "DATA.NUM_WORKERS (-1 takes all 8" in advice(config, LoaderLoad(0, 8))
    assert "more DATA.NUM_WORKERS (2 now, 8 cores)" in advice(config, LoaderLoad(2, 8, computing=0.95))
    reference = load_config(tiny.cfg, overrides={"DATA.PIPELINE": "reference"})
    text = advice(reference, LoaderLoad(8, 8, computing=0.95))
    assert "DATA.PIPELINE fast" in text
    assert "NUM_WORKERS" not in text
    digits = load_config(tiny.cfg, overrides={"DATA.DATASET": "digits"})
    assert "CACHE_DECODED" not in advice(digits, LoaderLoad(8, 8, computing=0.95))


def test_working_children_are_accounted_for() -> None:
    import multiprocessing
    import time

    def burn() -> None:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        time.sleep(60)

    child = multiprocessing.get_context("fork").Process(target=burn, daemon=True)
    child.start()
    try:
        deadline = time.monotonic() + 20
        while data_wait.worker_times()[0] < 0.25 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert data_wait.worker_times()[0] >= 0.25
    finally:
        child.kill()
        child.join()
