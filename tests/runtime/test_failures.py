"""Errors that end a run: one line on the console for a user's mistake, the traceback in the log file alone."""

import os
import sys

import pytest
from timm.data import create_transform
from torch.utils.data import DataLoader

from tests.tiny_run import TinyRun
from utils.errors import ImageReadError, message_text
from utils.runtime.failures import error_text, is_user_error


class Broken:
    """A data set whose images cannot be read."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        raise ImageReadError(f"a.jpg (index {index}): the file is empty")


def test_message_of_a_data_worker_is_the_error_alone():
    with pytest.raises(ImageReadError) as info:
        list(DataLoader(Broken(), num_workers=1))
    assert "Traceback" in str(info.value)
    assert message_text(info.value) == "a.jpg (index 0): the file is empty"
    assert is_user_error(info.value)


def test_assertions_of_timm_are_user_errors_and_ours_are_bugs():
    with pytest.raises(AssertionError) as info:
        create_transform(32, is_training=True, auto_augment="rand-m9-foo3")
    assert is_user_error(info.value)
    assert error_text(info.value)
    with pytest.raises(AssertionError) as info:
        assert os.sep == ""
    assert not is_user_error(info.value)


def test_a_mistake_is_one_line_on_the_console_and_a_traceback_in_the_file(tmp_path, capsys):
    tiny = TinyRun(tmp_path)
    with pytest.raises(SystemExit) as info:
        tiny.train("--opts", "MODEL.NUM_CLASSES", 7)
    assert info.value.code == 1
    console = capsys.readouterr()
    assert "Traceback" not in console.out + console.err
    assert len([line for line in console.out.splitlines() if "ERROR" in line]) == 1
    assert "Traceback" in (tiny.output / "tiny" / "default" / "log_rank0.txt").read_text()


def test_another_recipe_is_refused_with_the_way_out_and_changes_nothing(tmp_path, capsys):
    tiny = TinyRun(tmp_path)
    folder = tiny.train("--epochs", 1)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(SystemExit):
        tiny.train("--epochs", 1, "--opts", "TRAIN.BASE_LR", 0.5)
    text = capsys.readouterr().out
    assert "--tag NEW" in text
    assert f"--cfg {folder / 'config.yaml'}" in text
    assert (folder / "config.yaml").read_text() == before


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    tiny = TinyRun(tmp_path)
    monkeypatch.setattr(sys.modules["main"], "build_training", lambda _: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        tiny.train()
