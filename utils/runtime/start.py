"""Start and end of a run: processes, device, seeds, output folder, log. Their order is fixed here."""

import fcntl
import json
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from yacs.config import CfgNode

from utils.config import config_notices, dump_config, recipe_deviations, run_folder
from utils.errors import CheckpointError, NonFiniteError, RunError
from utils.runtime.distributed import get_local_rank, get_rank, get_world_size, is_distributed, on_main_process
from utils.runtime.files import write_text_atomic
from utils.runtime.logging import setup_logging, teardown_logging
from utils.runtime.random_state import seed_process

logger = logging.getLogger(__name__)

# Errors whose message says all: what is wrong, where, and what to do.
USER_ERRORS = (ValueError, OSError, CheckpointError, NonFiniteError, RunError)


@dataclass(frozen=True)
class Run:
    """What is known only at run time.

    Attributes:
        device: this process's device.
        rank, world_size: its place among the processes.
        output_dir: ``OUTPUT/MODEL.NAME/TAG``; exists.
    """

    device: torch.device
    rank: int
    world_size: int
    output_dir: Path

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
            write_text_atomic(self.output_dir / "status.json", json.dumps(row, indent=1) + "\n")

    def write_failure(self, error: BaseException) -> None:
        """Write the state failed. A disk that takes nothing any more only warns: ``error`` must stay the last word."""
        try:
            logs = {"logs": "the first error in log_rank*.txt is the cause"} if self.world_size > 1 else {}
            self.write_status("failed", error=f"{type(error).__name__}: {error_text(error)}", **logs)
        except OSError as problem:
            logger.warning("status.json could not be written: %s", problem)


def error_text(error: BaseException) -> str:
    """Return the message of an error with the notes that were added to it."""
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


@contextmanager
def start_run(config: CfgNode, *, locked: bool = True) -> Iterator[Run]:
    """Open a run and close it again, whatever happens inside.

    Process group -> device -> seeds -> output folder and its lock -> log -> ``config.yaml`` and ``deviations.json``. A
    process group always exists: NCCL and gloo with a GPU, gloo on the CPU, one process without a launcher.

    Args:
        config: frozen config.
        locked: refuse to share the output folder with another live run (training); evaluation does not lock.

    Raises:
        SystemExit: code 1, after one of ``USER_ERRORS`` has been logged, be it from inside or from here: another run
            holds the folder, it cannot be made or written, the launcher's environment is half set.
    """
    lock = None
    try:
        device = _select_device()
        _init_process_group(config, device)
        seed_process(config.SEED + get_rank())
        torch.backends.cudnn.benchmark = device.type == "cuda"
        run = Run(device, get_rank(), get_world_size(), run_folder(config))
        lock = _prepare_folder(run, locked)
        setup_logging(run.output_dir, run.rank)
        _log_start(config, run)
        if locked:
            _record_recipe(config, run)
        yield run
    except BaseException as error:
        _log_failure(error)
        # With several processes the group is not destroyed: the others may be stuck in a collective, and the loss of
        # their connection to this process is what ends them.
        if is_distributed() and get_world_size() == 1:
            dist.destroy_process_group()
        if isinstance(error, USER_ERRORS):
            raise SystemExit(1) from error
        raise
    else:
        dist.barrier()
        dist.destroy_process_group()
    finally:
        if lock is not None:
            os.close(lock)
        teardown_logging()


def _log_failure(error: BaseException) -> None:
    """Log what ends the run; the console gets the traceback of bugs only, the file that of every error."""
    if not isinstance(error, (SystemExit, KeyboardInterrupt)):
        brief = {"brief": isinstance(error, USER_ERRORS)}
        logger.error("rank %d stops: %s", get_rank(), error_text(error), exc_info=True, extra=brief)


def _select_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = get_local_rank()
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK is {index}, but this machine shows {torch.cuda.device_count()} GPU(s); "
            "start at most one process per GPU (--nproc_per_node)"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _init_process_group(config: CfgNode, device: torch.device) -> None:
    """Join the launcher's processes, or make a group of one."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.TRAIN.DIST_TIMEOUT)
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if {"RANK", "WORLD_SIZE"} <= set(missing):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if missing:
        raise RunError(
            f"the environment of a distributed run is half set: {', '.join(missing)} missing; "
            "start with torchrun, or unset RANK and WORLD_SIZE"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, rank, world_size = next(rendezvous("env://", rank, world_size, timeout=timeout))
    # torchrun keeps its store across --max-restarts, with the addresses of the dead attempt in it: each attempt gets
    # keys of its own.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _prepare_folder(run: Run, locked: bool) -> int | None:
    """Make the output folder, remove what a killed run left, and return rank 0's lock; all ranks fail together."""

    def prepare() -> int | None:
        lock = None
        try:
            run.output_dir.mkdir(parents=True, exist_ok=True)
            if locked:
                lock = _lock_folder(run.output_dir)
                for leftover in run.output_dir.glob(".*.tmp-*"):
                    leftover.unlink()
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
            f"{output_dir} is in use by {owner}; wait for it, or give this run another --tag or --output"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _log_start(config: CfgNode, run: Run) -> None:
    """Log what runs where, and what the config's user should know."""
    logger.info("command: %s", " ".join(sys.argv))
    device = f"CPU, {torch.get_num_threads()} thread(s) per process"
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
    for notice in config_notices(config):
        logger.warning(notice)


def _record_recipe(config: CfgNode, run: Run) -> None:
    """Log the deviations from the published recipe; write ``config.yaml`` and ``deviations.json``."""
    deviations = recipe_deviations(config)
    logger.info("deviations from the published recipe: %s", "none" if not deviations else "")
    for key, (published, actual) in deviations.items():
        logger.info("  %s: published %s, here %s", key, published, actual)
    if run.is_main:
        write_text_atomic(run.output_dir / "config.yaml", dump_config(config))
        rows = {key: {"published": published, "actual": actual} for key, (published, actual) in deviations.items()}
        write_text_atomic(run.output_dir / "deviations.json", json.dumps(rows, indent=1, default=list) + "\n")
