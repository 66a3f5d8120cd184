"""Training a compiled model."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config

import main
from tests.faults.harness import assert_same_state, step_file
from tests.tiny_run import TinyRun
from utils.checkpoint.files import load_checkpoint


@pytest.fixture
def requests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, float]]]:
    """Cut graphs but generate no code, which takes minutes on a CPU; give the modes and budgets that were asked for."""
    compile_in_place, requests = nn.Module.compile, []
    backend = getattr(request, "param", "aot_eager")

    def compile_quickly(self: nn.Module, *, mode: str = "default", **how: Any) -> None:
        requests.append((mode, config.activation_memory_budget))
        compile_in_place(self, backend=backend, **how)

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    with config.patch(activation_memory_budget=1.0):
        yield requests


@pytest.mark.usefixtures("requests")
def test_compiled_training(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """One graph a stage for training and one for evaluation, all made before the first update; clean checkpoints."""
    train_one_epoch, graphs = main.train_one_epoch, []

    def counting(*args):
        graphs.append(counters["stats"]["unique_graphs"])
        return train_one_epoch(*args)

    monkeypatch.setattr(main, "train_one_epoch", counting)
    counters.clear()
    words = ("--opts", "MODEL.STRIP_MLP.LAYERS", "[1, 1, 2, 1]", "MODEL.DROP_PATH_RATE", 0.0)
    plain = tiny.train(*words, tag="plain")
    assert graphs == [0, 0]
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny.folder / "cache"))
    compiled = tiny.train("--compile", *words, tag="compiled")
    assert graphs[2:] == [8, 8]
    assert counters["stats"]["unique_graphs"] == 8  # the last, smaller batch of the evaluation ran as it is
    assert not counters["graph_break"]
    log = capsys.readouterr().out
    assert f"Cache: {tiny.folder / 'cache' / 'strip_mlp' / 'torchinductor'}" in log
    assert re.search(r"compiled and warmed up in [\d.]+ s, 8 graphs", log)
    keys = [list(load_checkpoint(folder / "checkpoint_last.pth")["model"]) for folder in (plain, compiled)]
    assert keys[0] == keys[1]
    losses = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for folder in (plain, compiled)]
    assert losses[0]["train_loss"] == pytest.approx(losses[1]["train_loss"], rel=1e-3)


@pytest.mark.parametrize("requests", ("eager",), indirect=True)
def test_a_resumed_compiled_run_has_the_same_bits(tiny: TinyRun, requests: list[tuple[str, float]]) -> None:
    """With averaged weights, accumulation, activation checkpointing and bfloat16, from the middle of an epoch."""
    words = ("--compile", "--amp", "bf16", "--accumulation-steps", 2, "--use-checkpoint")
    keys = ["TRAIN.EMA_DECAY", 0.9, "TRAIN.SAVE_STEPS", 2, "TRAIN.SAVE_KEEP", 9]
    keys += ["TRAIN.MEMORY_BUDGET", 0.4]
    whole = tiny.train(*words, "--opts", *keys, tag="whole")
    again = tiny.train(*words, "--resume", step_file(whole, 4), "--opts", *keys, tag="again")
    assert_same_state(again / "checkpoint_last.pth", whole / "checkpoint_last.pth")
    assert set(requests) == {("default", 0.4)}


def test_cuda_graphs_do_not_accumulate(tiny: TinyRun, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        tiny.train(
            "--compile", "--accumulation-steps", 2, "--opts", "TRAIN.COMPILE_MODE", "reduce-overhead", tag="none"
        )
    assert "TRAIN.COMPILE_MODE reduce-overhead leaves gradients" in capsys.readouterr().err


@pytest.mark.parametrize("requests", ("eager",), indirect=True)
def test_a_compiled_baseline(tiny: TinyRun, requests: list[tuple[str, float]]) -> None:
    words = ("MODEL.TYPE", "timm", "MODEL.TIMM_NAME", "test_convnext", "TRAIN.EPOCHS", 1)
    folder = tiny.train("--compile", "--opts", *words, "TRAIN.COMPILE_MODE", "reduce-overhead", tag="baseline")
    assert set(requests) == {("reduce-overhead", 1.0)}
    assert json.loads((folder / "metrics.jsonl").read_text())["epoch"] == 1
