"""Logging of a run: coloured lines on the console of rank 0, a plain file per rank in the output folder."""

import logging
import sys
from pathlib import Path

from termcolor import colored

_DATE = "%Y-%m-%d %H:%M:%S"


class _ConsoleFormatter(logging.Formatter):
    """Omits the traceback of records marked ``brief``, whose message says all."""

    def format(self, record: logging.LogRecord) -> str:
        if not getattr(record, "brief", False):
            return super().format(record)
        brief = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None})
        return super().format(brief)


def setup_logging(output_dir: Path | None, rank: int) -> None:
    """Send the root logger to the console (rank 0 only, stdout) and to ``output_dir/log_rank{rank}.txt``.

    Args:
        output_dir: existing folder, or None for no file.
        rank: rank of this process; ranks other than 0 show only errors on the console.
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

    if output_dir is not None:
        file = logging.FileHandler(output_dir / f"log_rank{rank}.txt", mode="a", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s", _DATE))
        root.addHandler(file)
    logging.captureWarnings(True)


def teardown_logging() -> None:
    """Flush, close and remove the handlers that ``setup_logging`` installed."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) in (logging.StreamHandler, logging.FileHandler):
            root.removeHandler(handler)
            handler.flush()
            if isinstance(handler, logging.FileHandler):
                handler.close()
    logging.captureWarnings(False)
