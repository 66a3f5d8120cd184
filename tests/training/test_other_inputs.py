"""Runs on images of another size and of other channels than those that the weights were trained on."""

import logging
from pathlib import Path

import pytest
import torch

import main
from models import fit_weights, from_published
from tests.builders import tiny_network
from tests.tiny_run import TinyRun
from utils.checkpoint.files import load_checkpoint

WIDE = ("--opts", "DATA.IMG_SIZE", "32,64")
GREY = (*WIDE, "MODEL.STRIP_MLP.IN_CHANS", "1")


@pytest.fixture(scope="module")
def checkpoint(tiny: TinyRun) -> Path:
    return tiny.train("--epochs", 1, "--opts", "TRAIN.EMA_DECAY", 0.5) / "checkpoint_last.pth"


def test_fine_tuning_on_grey_rectangles(tiny, checkpoint, caplog):
    frozen = ("TRAIN.BASE_LR", "1e-30", "TRAIN.WARMUP_LR", "0", "TRAIN.MIN_LR", "0", "TRAIN.WEIGHT_DECAY", "0")
    with caplog.at_level(logging.WARNING):
        folder = tiny.train("--pretrained", checkpoint, "--epochs", 1, *GREY, *frozen, tag="grey")
    assert "stem patch_embed.weight adapted from 3 to 1 channels" in caplog.text
    assert "16 weights of 32 x 32 images resampled to 32 x 64" in caplog.text
    assert "preprocessing img_size" in caplog.text
    assert "preprocessing mean" in caplog.text
    trained = load_checkpoint(folder / "checkpoint_last.pth")
    model = tiny_network(img_size=(32, 64), in_chans=1)
    expected, _ = fit_weights(from_published(load_checkpoint(checkpoint)["ema"]), model)
    for name, _ in model.named_parameters():
        torch.testing.assert_close(trained["model"][name], expected[name], msg=name)
    assert trained["preprocessing"]["img_size"] == [32, 64]
    assert trained["preprocessing"]["mean"] == pytest.approx([0.449])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = tiny.evaluate(folder / "checkpoint_last.pth", *GREY)
    assert result["img_size"] == [32, 64]
    assert not [record for record in caplog.records if "preprocessing" in record.message]
    with pytest.raises(SystemExit):
        tiny.evaluate(folder / "checkpoint_last.pth")
    assert "its stem takes images of 1 channels, this model 3; only one for 3 channels is adapted" in caplog.text
    assert "set MODEL.STRIP_MLP.IN_CHANS 1" in caplog.text


def test_a_run_continues_on_rectangles(tiny):
    words = (*GREY, "TRAIN.EMA_DECAY", 0.5)
    folder = tiny.train("--epochs", 1, *words, tag="going_on")
    tiny.train("--epochs", 2, "--allow-change", "TRAIN.EPOCHS", *words, tag="going_on")
    assert load_checkpoint(folder / "checkpoint_last.pth")["progress"]["epoch"] == 2


@pytest.mark.parametrize("allowed", ((), ("--allow-change", "DATA.IMG_SIZE")))
def test_a_run_does_not_continue_at_another_size(tiny, checkpoint, caplog, allowed):
    words = ("--resume", checkpoint, "--epochs", 1, *allowed, *WIDE, "TRAIN.EMA_DECAY", 0.5)
    with pytest.raises(SystemExit):
        main.main(tiny.argv(*words, tag="refused"))
    assert (
        "DATA.IMG_SIZE: 32 in the checkpoint, (32, 64) now: averaged weights and the optimizer's state" in caplog.text
    )
    assert f"start a new run from its weights: --pretrained {checkpoint} --tag NEW" in caplog.text
    assert "allow with --allow-change DATA.IMG_SIZE" not in caplog.text


def test_evaluation_at_another_size_resamples_and_says_so(tiny, checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        result = tiny.evaluate(checkpoint, *WIDE)
    assert result["num_samples"] == 9
    assert "16 weights of 32 x 32 images resampled to 32 x 64" in caplog.text
    assert "preprocessing img_size" in caplog.text


def test_throughput_of_grey_rectangles(tiny, monkeypatch, caplog):
    monkeypatch.setattr("main_eval.THROUGHPUT_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        main.main(tiny.argv("--throughput", *GREY))
    assert "batch 4, 32 x 64" in caplog.text
