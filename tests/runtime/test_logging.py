"""The log of a run."""

import logging
from pathlib import Path

import pytest

from utils.runtime.logging import add_log_file, setup_logging, teardown_logging


def test_names_from_outside_reach_terminal_and_file_as_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger, level = logging.getLogger("test"), logging.root.level
    setup_logging(0)
    try:
        add_log_file(tmp_path, 0)
        logger.info("class %s\nnext line", "\x1b[31mred\udcff\u202e")
        logger.error("failed", exc_info=ValueError("\x1b[2J"))
    finally:
        teardown_logging()
        logging.root.setLevel(level)
    shown = capsys.readouterr()
    assert not shown.err  # where logging reports what it could not write
    for text in (shown.out, (tmp_path / "log_rank0.txt").read_text()):
        assert r"class \x1b[31mred\udcff\u202e" in text
        assert "\nnext line\n" in text
        assert r"ValueError: \x1b[2J" in text
        assert "\x1b" not in text
