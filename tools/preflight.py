"""Try a run before it starts: check what would stop it, measure it for a minute, predict its end.

    python tools/preflight.py --cfg configs/<leaf>.yaml --data-path <folder> [flags of main.py]
    python tools/preflight.py --cfg configs/<leaf>.yaml --data-path <folder> --pretend-world 8 --json

Takes the flags of main.py, and writes nothing. It is one process: ``--pretend-world N`` checks and predicts a run of N
processes, each with a device and cores like this one's. An error in one part of the check does not stop the others.

Exit status: 0 the run can start; 1 something would fail, each finding names its remedy; 2 wrong usage.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from yacs.config import CfgNode

from tools.common import run_tool, whole_number
from tools.dry_run.checks import check_disk, check_images, check_logger, check_settings_and_data, work_out_recipe
from tools.dry_run.forecast import check_starting_point, forecast, is_measurable
from tools.dry_run.report import Report
from utils.config import ConfigError, parse
from utils.errors import RunError
from utils.runtime import Run, start_run
from utils.training import batch_choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    report = Report()

    def recover(error: Exception) -> CfgNode | None:
        report.error(error)
        return error.config if isinstance(error, ConfigError) else None

    args, config = parse(argv, "Try a run of main.py before it starts.", add_flags=add_flags, recover=recover)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("preflight is one process: leave out torchrun; --pretend-world N stands for N processes")
    if config is not None:
        if config.EVAL_MODE or config.THROUGHPUT_MODE:
            raise ValueError("preflight tries a training: leave out --eval and --throughput")
        with dry_run(config, report) as run:
            check(config, run, args, report)
    print(report.json() if args.json else report.table())
    return int(report.failed())


def check(config: CfgNode, run: Run, args: argparse.Namespace, report: Report) -> None:
    """Check, measure and predict; the report holds what was found."""
    world_size = args.pretend_world
    report.figures["processes"] = world_size
    with report.part("batch"):
        config = batch_choices(config, world_size)[-1]  # with TRAIN.GLOBAL_BATCH, the smallest that a run may take
    _say("checking settings and data")
    begun = time.monotonic()
    loaders = check_settings_and_data(config, run.device, world_size, report)
    seconds_used = time.monotonic() - begun
    with report.part("images"):
        _say("reading a sample of the images")
        check_images(config, loaders, args.sample, report)
    with report.part("recipe"):
        work_out_recipe(config, loaders[0], world_size, report)
    check_logger(config, report)
    if not is_measurable(loaders, report):
        report.row("not measured", "see what fails below")
    elif args.seconds <= 0:
        report.row("not measured", "--seconds 0")
        if not report.failed("classes and batch"):
            check_starting_point(config, run, loaders, report, world_size=world_size, allow_change=args.allow_change)
    else:
        with report.part("measuring"):
            forecast(
                config,
                run,
                loaders,
                report,
                world_size=world_size,
                seconds=args.seconds,
                seconds_used=seconds_used,
                allow_change=args.allow_change,
                say=_say,
            )
    with report.part("disk"):  # last: a time budget becomes a number of epochs by what is measured
        check_disk(config, 1 if loaders[0] is None else len(loaders[0].dataset.classes), report)


@contextmanager
def dry_run(config: CfgNode, report: Report) -> Iterator[Run]:
    """Open a run as main.py does, but in a temporary folder; of its log, the report hears the warnings."""
    log, root = StringIO(), logging.getLogger()
    elsewhere = config.clone()
    elsewhere.defrost()
    root.addHandler(report)
    try:
        with tempfile.TemporaryDirectory(prefix="preflight-") as elsewhere.OUTPUT, ExitStack() as stack:
            with redirect_stdout(log):
                run = stack.enter_context(start_run(elsewhere, training=False))
            yield run
    except SystemExit:
        sys.stderr.write(log.getvalue())
        raise
    finally:
        root.removeHandler(report)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this program to those of main.py."""
    parser.add_argument(
        "--pretend-world",
        type=whole_number(1, 1_000_000),
        default=1,
        metavar="N",
        help="check and predict a run of N processes (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print findings and figures as JSON instead of a table")
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=10.0,
        metavar="S",
        help="length of each of three trials; 0 = only check (default: 10)",
    )
    parser.add_argument(
        "--sample",
        type=whole_number(1, 100_000_000),
        default=500,
        metavar="N",
        help="images to read of training and of validation (default: 500)",
    )


def seconds(text: str) -> float:
    """Return a length of time of the command line, up to an hour.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:  # false for nan
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return value


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(main))
