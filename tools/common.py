"""What the tools share: flags that name a checkpoint, errors as one line, safe text, progress, files."""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

from tqdm import tqdm

from data import expanded_path
from inference import Opened, open_checkpoint
from utils.errors import CheckpointError, ImageReadError, NonFiniteError, RunError
from utils.runtime import atomic_file, printable

QUIET_SECONDS = 20.0  # between two lines of progress where there is no terminal
USER_ERRORS = (ValueError, OSError, CheckpointError, ImageReadError, NonFiniteError, RunError)


def checkpoint_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with CHECKPOINT and the flags of ``open_from``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file to open, or https://...#sha256=...")
    parser.add_argument("--cfg", metavar="FILE", help="config file instead of the configuration in the checkpoint")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="set any key")
    parser.add_argument("--weights", choices=("model", "ema"), help="default: the moving average if the file has one")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    return parser


def open_from(args: argparse.Namespace, **overrides: Any) -> Opened:
    """Open the checkpoint that the flags of ``checkpoint_parser`` name; ``SECTION__KEY=value`` override keys."""
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    return open_checkpoint(
        args.checkpoint, args.cfg, opts=args.opts, overrides=keys, weights=args.weights, device=args.device
    )


def run_tool(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status; what the user can mend is one message and status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return command(argv)
    except BrokenPipeError:  # what reads the output has ended, as head does; what Python still holds of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        print(f"error: {printable(str(error), keep_lines=True)}", file=sys.stderr)
        return 2


def shortened(name: str, width: int) -> str:
    """Return a name that is safe to show, in at most ``width`` characters."""
    name = printable(name)
    return name if len(name) <= width else f"{name[: width - 1]}…"


def progress(items: Iterable | None = None, *, total: int | None = None, desc: str, unit: str = "img") -> tqdm:
    """Return a progress bar on a terminal, and a line every ``QUIET_SECONDS`` elsewhere."""
    return tqdm(items, total=total, desc=desc, unit=unit, mininterval=0.1 if sys.stderr.isatty() else QUIET_SECONDS)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say every ``QUIET_SECONDS`` that the work in the block goes on."""
    done, start = Event(), perf_counter()

    def speak() -> None:
        while not done.wait(QUIET_SECONDS):
            print(f"{what} ... {perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    speaker = Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` as a whole.

    Raises:
        OSError: the folder is missing or cannot be written; names ``path``.
    """
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def make_folder(folder: Path, flag: str = "--output") -> Path:
    """Make the folder that ``flag`` names and try to write to it, before any work is done; return it.

    Raises:
        OSError: it cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{folder} is a file; name a folder with {flag}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {folder}: {error.strerror or error}; name another with {flag}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"cannot write to {folder}; name another folder with {flag}")
    return folder


def keep_inputs(inputs: Iterable[str | Path], outputs: Iterable[Path | None]) -> None:
    """Refuse to write over a file that the command reads; an output of None is not written.

    Raises:
        ValueError: names the output.
    """
    for output in filter(None, outputs):
        if any(os.path.realpath(output) == os.path.realpath(one) for one in inputs):
            raise ValueError(f"{output} would replace a file that this command reads; name another file to write")


def begin_worker() -> None:
    """Prepare a process of a pool: Ctrl-C is left to its parent, and where the parent is killed it ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a type for a flag that takes a whole number from ``low`` to ``high``."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return number


def output_path(text: str) -> Path:
    """Return the path of a file to write, of a command line; its folder has to be there before the work starts."""
    path = expanded_path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {path} does not exist; make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"cannot write {path}; name another file")
    return path
