"""Evaluation of data that hold a part of the classes, and of weights that do not say what they are for."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from main_eval import main
from tests.images import write_folder
from tests.tiny_run import TinyRun
from utils.checkpoint.files import load_checkpoint


def fails(tiny: TinyRun, caplog, *words: object) -> str:
    with pytest.raises(SystemExit):
        main(tiny.argv(*words, tag="refused"))
    return caplog.text


def part_of(tiny: TinyRun, folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(tiny.data / "val" / name, folder / "val" / name)
    return folder


def test_a_part_of_the_classes_is_matched_by_name(tiny, checkpoint, tmp_path, caplog):
    folder = part_of(tiny, tmp_path, "emu", "dog")
    with caplog.at_level(logging.WARNING):
        result = tiny.evaluate(checkpoint, "--data-path", folder)
    assert "the data set holds 2 of the 3 classes of" in caplog.text
    assert result["num_samples"] == 6
    assert result["acc5"] == 100.0  # of two scores
    one = tiny.evaluate(checkpoint, "--data-path", part_of(tiny, tmp_path / "one", "dog"))
    assert (one["acc1"], one["loss"]) == (100.0, 0.0)  # the scores of other classes do not count


def test_a_class_that_the_checkpoint_lacks(tiny, checkpoint, tmp_path, caplog):
    write_folder(tmp_path / "val", ("dog", "owl"), 2)
    words = ("--resume", checkpoint, "--data-path", tmp_path)
    assert "the data set's classes are not the ones of" in fails(tiny, caplog, *words)


def test_no_names_to_match_a_part_by(tiny, bare, tmp_path, caplog):
    folder = part_of(tiny, tmp_path, "emu", "dog")
    text = fails(tiny, caplog, "--resume", bare, "--data-path", folder)
    assert "holds no class names to match them by" in text
    assert "set MODEL.NUM_CLASSES" not in text  # advice that the weights would refuse
    (folder / "classes.txt").write_text("cat\ndog\nemu\n")
    order = ("--opts", "DATA.CLASS_ORDER", "file")
    assert tiny.evaluate(bare, "--data-path", folder, *order)["num_samples"] == 6


def test_numbers_in_the_order_of_text_are_warned_of(tiny, bare, tmp_path, caplog):
    write_folder(tmp_path / "val", ("1", "2", "10"), 2)
    with caplog.at_level(logging.INFO):
        tiny.evaluate(bare, "--data-path", tmp_path)
    assert "label 0 is taken to be '1', the last '2'" in caplog.text
    assert "for 2 before 10: DATA.CLASS_ORDER numeric" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        tiny.evaluate(bare, "--data-path", tmp_path, "--opts", "DATA.CLASS_ORDER", "numeric")
    assert "label 0 is taken to be '1', the last '10'" in caplog.text
    assert "for 2 before 10" not in caplog.text


def test_weights_are_chosen_on_the_command_line(tiny, checkpoint, bare):
    weights = load_checkpoint(bare)
    other = {f"net.{name}": value for name, value in weights.items()}
    torch.save({"student": {n: v * 0 for n, v in other.items()}, "teacher": other}, tiny.folder / "two.pth")
    flags = ("--weights-key", "teacher", "--strip-prefix", "net.")
    result = tiny.evaluate(tiny.folder / "two.pth", *flags)
    assert result["loss"] == tiny.evaluate(checkpoint)["loss"]
