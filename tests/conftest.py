"""Shared settings of the tests: one thread, CPU only, offline. And what many of them train: a tiny run."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.tiny_run import TinyRun


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "TinyRun":
    from tests.tiny_run import TinyRun  # imported here: tests that train nothing start without it

    return TinyRun(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def checkpoint(tiny: "TinyRun") -> Path:
    """A checkpoint of the tiny run after one epoch."""
    return tiny.train("--epochs", 1) / "checkpoint_last.pth"


@pytest.fixture(scope="module")
def bare(tiny: "TinyRun", checkpoint: Path) -> Path:
    """The weights of ``checkpoint`` alone, without names of classes and configuration."""
    torch.save(torch.load(checkpoint, weights_only=True)["model"], tiny.folder / "bare.pth")
    return tiny.folder / "bare.pth"


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the curves, which take longer than the training of the tiny run."""
    from utils.training import records

    monkeypatch.setattr(records, "plot_curves", lambda *_: None)
