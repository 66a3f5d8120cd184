"""Logging of a run: coloured lines on the console of rank 0, a plain file per rank in the output folder."""

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from termcolor import colored

from utils.runtime.files import side_file
from utils.runtime.text import printable

_DATE = "%Y-%m-%d %H:%M:%S"
_EARLY_RECORDS = 1000


class _Formatter(logging.Formatter):
    """Writes control characters and the like as escapes: names of files and classes come from outside."""

    def format(self, record: logging.LogRecord) -> str:
        safe = {"msg": printable(record.getMessage(), keep_lines=True), "args": (), "exc_text": None}
        return super().format(logging.makeLogRecord({**record.__dict__, **safe}))

    def formatException(self, ei: Any) -> str:
        return printable(super().formatException(ei), keep_lines=True)


class _ConsoleFormatter(_Formatter):
    """Omits the traceback of records marked ``brief``, whose message says all."""

    def format(self, record: logging.LogRecord) -> str:
        if not getattr(record, "brief", False):
            return super().format(record)
        brief = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None})
        return super().format(brief)


def setup_logging(rank: int) -> None:
    """Send the root logger to the console (stdout), and keep the records until ``add_log_file`` has a file for them.

    Args:
        rank: rank of this process; ranks other than 0 show only errors.
    """
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    teardown_logging()
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    prefix = "" if rank == 0 else f"rank {rank} "
    stamp = colored("%(asctime)s", "green") if sys.stdout.isatty() else "%(asctime)s"
    console.setFormatter(_ConsoleFormatter(f"{stamp} {prefix}%(levelname)s %(message)s", _DATE))
    root.addHandler(console)
    root.addHandler(MemoryHandler(_EARLY_RECORDS, flushLevel=logging.CRITICAL + 1, flushOnClose=False))
    logging.captureWarnings(True)


def add_log_file(output_dir: Path, rank: int) -> None:
    """Send the root logger to ``output_dir/log_rank{rank}.txt`` too, from the first record on.

    Where that file cannot be written, the run goes on without it, after a warning.
    """
    root, path = logging.getLogger(), output_dir / f"log_rank{rank}.txt"
    file: logging.Handler = logging.NullHandler()
    with side_file(path):
        output_dir.mkdir(parents=True, exist_ok=True)  # rank 0 has made the one of its host
        file = logging.FileHandler(path, mode="a", encoding="utf-8")
        file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s %(message)s", _DATE))
    for early in [handler for handler in root.handlers if type(handler) is MemoryHandler]:
        root.removeHandler(early)
        early.setTarget(file)
        early.flush()
        early.close()
    root.addHandler(file)


def teardown_logging() -> None:
    """Flush, close and remove the handlers that were installed here."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) in (logging.StreamHandler, logging.FileHandler, logging.NullHandler, MemoryHandler):
            root.removeHandler(handler)
            handler.flush()
            if type(handler) is not logging.StreamHandler:
                handler.close()
    logging.captureWarnings(False)
