"""Two processes under the launchers that people use: the published command lines, unchanged, and torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_run import TinyRun
from utils.checkpoint.files import load_checkpoint

ROOT = Path(__file__).parents[2]
LAUNCH = ("-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def start(*words: object) -> str:
    """Run a Python command line from the project's folder; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tiny: TinyRun) -> Path:
    """Two processes, started with the published command line of torch.distributed.launch."""
    out = start(*LAUNCH, 29731, "main.py", *tiny.argv("--batch-size", 4, tag="two"))
    assert "8 images (4 x 2 process(es) x 1)" in out
    assert out.count("starting from scratch") == 1  # rank 0 speaks alone
    assert "9 samples" in out
    return tiny.output / "tiny/two"


def test_two_processes_train(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]  # 24 images in batches of 2 x 4
    assert all(row["val_samples"] == 9 for row in rows)
    assert json.loads((trained / "status.json").read_text())["state"] == "completed"


def test_evaluation_is_the_same_for_one_and_two_processes(tiny: TinyRun, trained: Path) -> None:
    logged = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    checkpoint = trained / "checkpoint_last.pth"
    alone = tiny.evaluate(checkpoint, tag="alone")
    start(*TORCHRUN, "main_eval.py", *tiny.argv("--resume", checkpoint, "--batch-size", 3, tag="both"))
    both = json.loads((tiny.output / "tiny/both/eval.json").read_text())
    assert alone["num_samples"] == both["num_samples"] == logged["val_samples"] == 9
    assert alone["acc1"] == both["acc1"] == logged["val_acc1"]
    assert alone["balanced_acc1"] == both["balanced_acc1"] == logged["val_balanced_acc1"]
    assert alone["loss"] == pytest.approx(both["loss"], rel=1e-6)
    assert alone["loss"] == pytest.approx(logged["val_loss"], rel=1e-6)


def test_two_processes_with_accumulation_make_the_update_of_one_large_batch(tiny: TinyRun) -> None:
    """2 processes x 2 images x 2 micro-batches see the same 8 images as 1 process with a batch of 8."""
    words = (
        "--opts",
        "MODEL.TYPE",
        "timm",
        "MODEL.TIMM_NAME",
        "test_convnext",
        "AUG.MIXUP",
        0.0,
        "AUG.CUTMIX",
        0.0,
        "MODEL.DROP_PATH_RATE",
        0.0,
        "AUG.REPROB",
        0.0,
    )
    start(*TORCHRUN, "main.py", *tiny.argv("--batch-size", 2, "--accumulation-steps", 2, *words, tag="small"))
    large = load_checkpoint(tiny.train("--batch-size", 8, *words, tag="large") / "checkpoint_last.pth")
    small = load_checkpoint(tiny.output / "tiny/small/checkpoint_last.pth")
    assert small["progress"]["global_step"] == large["progress"]["global_step"] == 6
    for key, value in large["model"].items():
        torch.testing.assert_close(small["model"][key], value, rtol=1e-3, atol=2e-4)


def test_half_set_environment_is_an_error(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(SystemExit) as exit_info:
        tiny.train(tag="half")
    assert exit_info.value.code == 1
    assert "MASTER_ADDR, MASTER_PORT missing" in caplog.text


def test_synchronised_batchnorm_needs_gpus(tiny: TinyRun, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        tiny.train("--opts", "TRAIN.SYNC_BN", True, tag="sync")
    assert "TRAIN.SYNC_BN" in capsys.readouterr().out
