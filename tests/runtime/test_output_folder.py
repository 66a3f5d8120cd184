"""The output folder: what it cannot do is known before training."""

import errno
import fcntl
import json
import os
import re

import pytest

from tests.tiny_run import TinyRun


@pytest.mark.parametrize("number", (errno.ENOSYS, errno.ENOLCK), ids=errno.errorcode.get)
def test_a_file_system_without_locks_costs_one_warning(tmp_path, monkeypatch, capsys, number):
    """Lustre and EFS: the run goes on and says what is no longer noticed."""

    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    folder = TinyRun(tmp_path).train("--epochs", 1)
    assert json.loads((folder / "status.json").read_text())["state"] == "completed"
    warning = "has no locks .*: a second run in the same folder would not be noticed"
    assert len(re.findall(warning, capsys.readouterr().out)) == 1
    assert re.search(warning, (folder / "log_rank0.txt").read_text())  # though it came before the file was open


def test_a_failing_lock_is_an_error(tmp_path, monkeypatch, capsys):
    def lockf(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(SystemExit):
        TinyRun(tmp_path).train()
    assert "cannot write the output folder" in capsys.readouterr().out


def test_a_disk_too_small_for_one_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.checkpoint.room.free_bytes", lambda _: 1000)
    tiny = TinyRun(tmp_path)
    with pytest.raises(SystemExit):
        tiny.train()
    text = capsys.readouterr().out
    assert re.search(r"a checkpoint takes about \d+ MB, but .* has 0 MB free", text)
    assert "epoch 1/" not in text


def test_a_folder_in_the_place_of_the_log_is_set_aside(tmp_path, capsys):
    tiny = TinyRun(tmp_path)
    log = tiny.output / "tiny" / "default" / "log_rank0.txt"
    log.mkdir(parents=True)
    tiny.train("--epochs", 1)
    assert "log_rank0.txt cannot be used and is now log_rank0.txt.aside" in capsys.readouterr().out
    assert "INFO" in log.read_text()


def test_a_log_that_cannot_be_written_is_done_without(tmp_path, capsys):
    tiny = TinyRun(tmp_path)
    log = tiny.output / "tiny" / "default" / "log_rank0.txt"
    log.parent.mkdir(parents=True)
    log.symlink_to(tmp_path / "missing" / "log.txt")
    folder = tiny.train("--epochs", 1)
    assert json.loads((folder / "status.json").read_text())["state"] == "completed"
    assert "log_rank0.txt could not be written" in capsys.readouterr().out
