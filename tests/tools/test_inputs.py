"""Flags and inputs that the tools refuse: one message that names the remedy, and nothing is written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import write_splits
from tests.tiny_run import TinyRun
from tools import compare, export, pack, predict, preflight, probe, report, seeds, show_batch, visualize
from tools.common import run_tool


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def checkpoint(tiny: TinyRun) -> Path:
    return tiny.train("--epochs", 1) / "checkpoint_last.pth"


def refused(command: Callable[..., int], words: list, capsys: pytest.CaptureFixture) -> str:
    """Run a command line that has to end with status 2; return the last line of its message."""
    try:
        status = run_tool(command, [str(word) for word in words])
    except SystemExit as end:
        status = end.code
    assert status == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "words", "remedy"),
    [
        (preflight.main, ("--cfg", "x.yaml", "--seconds", "nan"), "'nan' is not a number of seconds from 0 to 3600"),
        (seeds.command, ("--seeds", "0", "--cfg", "x.yaml"), "'0' is not a whole number from 1 to 1000"),
        (seeds.command, ("--seeds", "2", "--processes", "0", "--cfg", "x.yaml"), "'0' is not a whole number from 1"),
        (seeds.command, ("--seeds", "2", "--cfg", "x.yaml", "--seed", "3"), "--seed is given by --seeds"),
        (seeds.command, ("--seeds", "2", "--cfg", "x.yaml", "--seed=3"), "--seed is given by --seeds"),
        (pack.command, ("/nowhere", "out"), "/nowhere is not a folder; name one with train/ and val/"),
    ],
)
def test_flags(command, words, remedy, capsys):
    assert remedy in refused(command, list(words), capsys)


def test_a_file_that_is_read_is_not_replaced(tiny, checkpoint, capsys):
    before, image = checkpoint.read_bytes(), next(tiny.data.rglob("*.jpg"))
    for command, words in (
        (export.command, [checkpoint, "--format", "published", "--output", checkpoint]),
        (predict.command, [checkpoint, image, "--csv", checkpoint]),
        (predict.command, [checkpoint, image, "--sheet", image]),
        (show_batch.command, [checkpoint, "--data-path", tiny.data, "--output", checkpoint]),
        (compare.command, [checkpoint.parent, tiny.output, "--curves", checkpoint.parent / "metrics.jsonl"]),
    ):
        assert "would replace a file that this command reads" in refused(command, words, capsys)
    assert checkpoint.read_bytes() == before


def test_shards_are_not_put_among_the_images(tmp_path, capsys):
    data = write_splits(tmp_path / "data", ("a", "b"), train=2, val=1)
    before = sorted(data.rglob("*"))
    assert "lies among the images" in refused(pack.command, [data, data / "train", "--workers", 1], capsys)
    assert sorted(data.rglob("*")) == before


def test_too_few_images_are_found_before_the_first_fit(tiny, checkpoint, tmp_path, capsys):
    words = [checkpoint, "--data-path", tiny.data, "--cache", tmp_path, "--shots", 1, 500]
    assert run_tool(probe.command, [str(word) for word in words]) == 2
    shown = capsys.readouterr()
    assert "--shots 500: the smallest class has 8 training images" in shown.err
    assert "logistic" not in shown.out


def test_a_broken_image_is_named_in_one_line(tiny, checkpoint, tmp_path, capsys):
    data = write_splits(tmp_path / "data", ("cat", "dog", "emu"), train=4, val=1)
    for part in ("train", "val"):
        (data / part / "cat" / "a\x1b[5m\nb.png").write_bytes(b"junk")
    name = r"val/cat/a\x1b[5m\nb.png"
    for command, words in (
        (report.command, ["--data-path", data, "--output", tmp_path / "report"]),
        (visualize.command, ["--images", data / "val", "--show", "cam", "--output", tmp_path / "figures"]),
    ):
        message = refused(command, [checkpoint, *words], capsys)
        assert name in message
        assert "tools/check_data.py lists" in message
    words = ["--cfg", tiny.cfg, "--data-path", data, "--seconds", 0]
    assert run_tool(preflight.main, [str(word) for word in words]) == 1
    assert name in capsys.readouterr().out
