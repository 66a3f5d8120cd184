"""How the processes of a run find each other: the launcher's environment, the meeting point, the process group."""

import logging
import os
import socket
import threading
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.errors import RunError, one_line
from utils.runtime.distributed import environment_integer, get_local_rank

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 15.0  # of waiting for the others before the log says so
RESOLVE_SECONDS = 60.0  # the name of a host that is starting (Kubernetes) appears late
_POLL_SECONDS = 0.02
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Launchers that start every process by themselves, and the variable that holds how many. SLURM also sets SLURM_NTASKS
# in a batch script, which is one process, so the variable of the srun step decides.
_OTHER_LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
}


def select_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device called ``name``, or this process's: the GPU of its local rank, the CPU where there are no GPUs.

    Raises:
        RunError: there is no such device, or the machine has fewer GPUs than processes.
    """
    if name is not None:
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # PyTorch raises either
            reason = str(error).splitlines()[0]
            raise RunError(
                f"device {str(name)!r} cannot be used: {reason}; name cpu, cuda or cuda:N, or none for the default"
            ) from error
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = get_local_rank()
    if index >= torch.cuda.device_count():
        raise RunError(
            f"LOCAL_RANK is {index}, but this machine shows {torch.cuda.device_count()} GPU(s); "
            "start at most one process per GPU (--nproc_per_node)"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join_processes(device: torch.device, timeout_seconds: float) -> tuple[dist.Store, bool]:
    """Join the launcher's processes, or make a group of one.

    Args:
        device: this process's device: NCCL and gloo with a GPU, gloo on the CPU.
        timeout_seconds: ``TRAIN.DIST_TIMEOUT``.

    Returns:
        (store that the processes share, whether the launcher has started them before)

    Raises:
        RunError: the environment does not describe the processes, or they do not meet.
    """
    rank, world_size = _layout()
    timeout = timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if rank is None:
        alone = dist.HashStore()
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
        return alone, False
    meeting, attempt = _meet(rank, world_size, timeout)
    store = dist.PrefixStore(f"attempt_{attempt}", meeting)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        raise RunError(
            f"rank {rank} cannot connect to the other processes: {one_line(error)}; on a machine with several network "
            "interfaces, name the one to use with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
    return store, attempt > 1 or environment_integer("TORCHELASTIC_RESTART_COUNT", 0) > 0


def _layout() -> tuple[int | None, int]:
    """Return (rank, world size) from torchrun's environment variables; (None, 1) without a launcher."""
    missing = [name for name in _NEEDED if name not in os.environ]
    alone = {"RANK", "WORLD_SIZE"} <= set(missing)
    if missing and not alone:
        raise RunError(
            f"the environment of a distributed run is half set: {', '.join(missing)} missing; "
            "start with torchrun, or unset RANK and WORLD_SIZE"
        )
    rank, world_size = environment_integer("RANK", 0), environment_integer("WORLD_SIZE", 1)
    launcher, tasks = _other_launcher()
    if tasks > world_size:
        raise RunError(
            f"{launcher} started {tasks} processes, but nothing connects them: each would train on its own. Start one "
            "torchrun per node instead (docs/slurm/train.sbatch shows how), or a single process"
        )
    if not alone and rank >= world_size:
        raise RunError(f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks are numbered from 0")
    if not alone and not 0 < environment_integer("MASTER_PORT", 0) < 2**16:
        raise RunError(f"MASTER_PORT is {os.environ['MASTER_PORT']}, not a port (1 to 65535)")
    return None if alone else rank, world_size


def _other_launcher() -> tuple[str, int]:
    """Return the launcher that started this process, apart from torchrun, and the number of processes it started."""
    for launcher, names in _OTHER_LAUNCHERS.items():
        if launcher == "srun" and not {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(os.environ):
            continue
        for name in names:
            if name in os.environ:
                return launcher, environment_integer(name, 1)
    return "", 1


def _meet(rank: int, world_size: int, timeout: timedelta) -> tuple[dist.Store, int]:
    """Return the store at ``MASTER_ADDR:MASTER_PORT``, and which start this is of those that it has seen.

    PyTorch waits in compiled code, where a signal is not heard: it does so in a thread, and this one can be stopped.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _wait_for_name(host, port, min(RESOLVE_SECONDS, timeout.total_seconds()))
    outcome: list[tuple[dist.Store, int] | Exception] = []

    def wait() -> None:
        try:
            store = next(rendezvous("env://", rank, world_size, timeout=timeout))[0]
            outcome.append((store, _agree_on_attempt(store, rank, world_size, timeout)))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(NOTICE_SECONDS)
    if thread.is_alive():
        logger.warning(
            "rank %d of %d waits for the other processes at %s:%d, for at most %.0f s (TRAIN.DIST_TIMEOUT)",
            rank,
            world_size,
            host,
            port,
            timeout.total_seconds(),
        )
        thread.join()
    [result] = outcome
    if isinstance(result, Exception):
        raise RunError(
            f"rank {rank} of {world_size} did not meet the other processes at {host}:{port} (MASTER_ADDR, "
            f"MASTER_PORT): {one_line(result)}; is every process started, and the port free (torchrun --master_port)?"
        ) from result
    return result


def _agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> int:
    """Return the number of this start of the processes, the same in all of them; the first is 1.

    torchrun keeps its store over restarts, with what earlier processes left in it, such as their addresses. Its count
    of restarts tells the starts apart on one host only: a host that joins again begins at 0, the others do not. So
    rank 0 counts, and answers each process under a word that this process has made up and that no earlier one knew.

    Raises:
        RuntimeError: a process did not come in time, or two have the same rank.
    """
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"word_of_{rank}", word)
        attempt = int(store.get(f"attempt_of_{word}"))
        if store.add(f"came_to_{attempt}/{rank}", 1) > 1:
            raise RuntimeError(f"another process has RANK {rank} too")
        return attempt
    attempt, missing = store.add("attempts", 1), set(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank(s) {', '.join(map(str, sorted(missing)))} did not come")
        for other in sorted(missing):
            if store.check([f"word_of_{other}"]):
                store.set(f"attempt_of_{store.get(f'word_of_{other}').decode()}", str(attempt))
        time.sleep(_POLL_SECONDS)
        missing = {other for other in missing if not store.check([f"came_to_{attempt}/{other}"])}
    return attempt


def _wait_for_name(host: str, port: int, seconds: float) -> None:
    """Return when ``host`` has an address.

    Raises:
        RunError: it has none after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, port)
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RunError(
                    f"MASTER_ADDR is {host!r}, a host that is not known here ({error.strerror or error}); set it to "
                    "the name or address of the machine of rank 0"
                ) from error
            time.sleep(min(1.0, seconds))
