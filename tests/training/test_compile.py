"""Training a compiled model."""

import json

import pytest
from torch import nn
from torch._dynamo.utils import counters

import main
from tests.tiny_run import TinyRun
from utils.checkpoint.files import load_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("tiny"))


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
