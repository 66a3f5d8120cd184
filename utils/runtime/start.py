"""Start and end of a run: processes, device, seeds, output folder, log. Their order is fixed here."""

import fcntl
import json
import logging
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
import torch.distributed as dist
from yacs.config import CfgNode

from utils.config import config_notices, dump_config, recipe_deviations, run_folder
from utils.errors import RunError
from utils.runtime.agreement import SAME_START, machine_facts, require_agreement, start_facts
from utils.runtime.distributed import get_rank, get_world_size, is_distributed, on_main_process
from utils.runtime.failures import error_text, is_user_error, log_failure, phase, settle, tell_of_signal
from utils.runtime.files import UNSUPPORTED, side_file, try_folder, warn_once, write_text_atomic
from utils.runtime.hardware import crowding_advice, describe_cpu
from utils.runtime.launch import join_processes, select_device
from utils.runtime.logging import add_log_file, setup_logging, teardown_logging
from utils.runtime.random_state import seed_process
from utils.runtime.signals import Interrupted, signal_exit_code

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What is known only at run time.

    Attributes:
        device: this process's device.
        rank, world_size: its place among the processes.
        output_dir: ``OUTPUT/MODEL.NAME/TAG``; exists where rank 0 is. Other hosts may see another folder of that name.
        restarted: the launcher has started the run before (``torchrun --max-restarts``), as far as this process knows.
    """

    device: torch.device
    rank: int
    world_size: int
    output_dir: Path
    restarted: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes the shared files."""
        return self.rank == 0

    def write_status(self, state: str, **details: Any) -> None:
        """Write ``status.json`` on rank 0; ``state`` is running, preempted, completed or failed."""
        if self.is_main:
            row = {
                "state": state,
                **details,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "pid": os.getpid(),
                "host": socket.gethostname(),
            }
            path = self.output_dir / "status.json"
            with side_file(path):
                write_text_atomic(path, json.dumps(row, indent=1) + "\n")

    def write_recipe(self, config: CfgNode) -> None:
        """Write ``config.yaml`` and ``deviations.json`` on rank 0, once it is known that the run goes on with them."""
        if self.is_main:
            deviations = recipe_deviations(config)
            rows = {key: {"published": published, "actual": actual} for key, (published, actual) in deviations.items()}
            write_text_atomic(self.output_dir / "config.yaml", dump_config(config))
            text = json.dumps(rows, indent=1, default=list) + "\n"
            write_text_atomic(self.output_dir / "deviations.json", text)

    def write_end(self, error: BaseException) -> None:
        """Write how an error or a signal ended the run; on a disk that takes nothing any more, only warn."""
        try:
            if isinstance(error, Interrupted):
                self.write_status("preempted", reason=str(error))
            else:
                logs = {"logs": "the first error in log_rank*.txt is the cause"} if self.world_size > 1 else {}
                self.write_status("failed", error=f"{type(error).__name__}: {error_text(error)}", **logs)
        except OSError as problem:  # ``error`` must stay the last word
            logger.warning("status.json could not be written: %s", problem)


@contextmanager
def start_run(config: CfgNode, *, training: bool = True) -> Iterator[Run]:
    """Open a run and close it again, whatever happens inside.

    Console -> device -> process group -> agreement of the processes -> seeds -> output folder and its lock -> log file
    -> ``status.json``. A process group always exists: NCCL and gloo with a GPU, gloo on the CPU, one process without a
    launcher.

    Args:
        config: frozen config.
        training: the output folder belongs to this run alone, and tells its state. Evaluation shares it.

    Raises:
        SystemExit: after the reason was logged. Code 1: a user's mistake or a failure of the machine, be it from inside
            or from here. 130: Ctrl-C. ``signal_exit_code``: a signal before there was anything to save.
    """
    opened = lock = store = None
    setup_logging(0 if os.environ.get("RANK", "0") == "0" else 1)
    try:
        with phase("starting"):
            device = select_device()
            store, restarted = join_processes(device, config.TRAIN.DIST_TIMEOUT)
            setup_logging(get_rank())
            require_agreement(
                partial(start_facts, config, device), remedy=SAME_START, advisory=partial(machine_facts, device)
            )
            seed_process(config.SEED + get_rank())
            torch.backends.cudnn.benchmark = device.type == "cuda"
            run = Run(device, get_rank(), get_world_size(), run_folder(config), restarted)
            lock = _prepare_folder(run, training)
            add_log_file(run.output_dir, run.rank)
            opened = run if training else None  # from here on, its status.json is ours to write
            _log_start(config, run)
            if training:
                _log_deviations(config)
                run.write_status("running")
        yield run
    except BaseException as error:
        _end(settle(error, store), opened, store)
    else:
        dist.barrier()
        dist.destroy_process_group()
    finally:
        if lock is not None:
            os.close(lock)
        teardown_logging()


def _end(error: BaseException, run: Run | None, store: dist.Store | None) -> NoReturn:
    """Log and write down why the run ends, and raise what ends the process."""
    if isinstance(error, Interrupted):
        logger.warning("stopped: %s%s", error, "; nothing was saved, as no update was done" if run else "")
        tell_of_signal(error.number, store)
    elif isinstance(error, KeyboardInterrupt):
        logger.error("interrupted: ended at once, without saving")
    elif not isinstance(error, SystemExit):
        log_failure(error, store)
    if run is not None:
        run.write_end(error)
    # With several processes the group is not destroyed: the others may be stuck in a collective, and the loss of their
    # connection to this process is what ends them.
    if is_distributed() and get_world_size() == 1:
        dist.destroy_process_group()
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        raise SystemExit(signal_exit_code(number)) from error
    if is_user_error(error):
        raise SystemExit(1) from error
    raise error


def _prepare_folder(run: Run, training: bool) -> int | None:
    """Make the output folder and return rank 0's lock; all ranks fail together.

    What a killed run left is removed, and what a save needs is tried.
    """

    def prepare() -> int | None:
        lock = None
        try:
            run.output_dir.mkdir(parents=True, exist_ok=True)
            if training:
                lock = _lock_folder(run.output_dir)
                for leftover in run.output_dir.glob(".*.tmp-*"):
                    leftover.unlink()
                try_folder(run.output_dir)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"cannot write the output folder {run.output_dir}: {reason}; choose another with --output"
            ) from error
        return lock

    lock = on_main_process(prepare)
    return lock if run.is_main else None


def _lock_folder(output_dir: Path) -> int:
    path = output_dir / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # lockf, not flock: data workers, forked later, do not inherit it and cannot keep it after this process died
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise RunError(
            f"{output_dir} is in use by {owner}; give this run a folder of its own with --tag NEW (or --output), or "
            "wait for the other one"
        ) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            os.close(descriptor)
            raise
        warn_once(
            f"the file system of {output_dir} has no locks ({error.strerror}): a second run in the same folder would "
            "not be noticed, and both would damage each other's files"
        )
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _log_start(config: CfgNode, run: Run) -> None:
    """Log what runs where, and what the config's user should know."""
    logger.info("command: %s", " ".join(sys.argv))
    device = f"{describe_cpu()}, {torch.get_num_threads()} thread(s) per process"
    if run.device.type == "cuda":
        device = torch.cuda.get_device_name(run.device)
    logger.info(
        "Python %s, torch %s, timm %s; %d process(es) on %s; output in %s",
        platform.python_version(),
        torch.__version__,
        timm.__version__,
        run.world_size,
        device,
        run.output_dir,
    )
    advice = crowding_advice() if run.device.type == "cpu" else ""
    for notice in (*config_notices(config), *([advice] if advice else [])):
        logger.warning(notice)


def _log_deviations(config: CfgNode) -> None:
    """Log the deviations from the published recipe."""
    deviations = recipe_deviations(config)
    logger.info("deviations from the published recipe:%s", "" if deviations else " none")
    for key, (published, actual) in deviations.items():
        logger.info("  %s: published %s, here %s", key, published, actual)
