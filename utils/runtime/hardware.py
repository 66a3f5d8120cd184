"""What the processor of this machine can do, as far as PyTorch makes use of it."""

import os
import re
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")  # of a container, in version 2
# what the log calls it -> PyTorch's names, of which one is enough
_FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512_f", "avx512"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
    "AMX": ("amx_bf16", "amx_tile"),
}


def cpu_features() -> dict[str, bool] | None:
    """Return which of AVX2, AVX-512, bf16, fp16 and AMX this CPU has; None where this PyTorch does not tell.

    bf16 and fp16 mean that the CPU multiplies in that format itself. Without it PyTorch converts every number to
    float32 and back, which takes several times as long as computing in float32.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch before 2.12
        return None
    able = torch.cpu.get_capabilities()
    return {feature: any(able.get(name) for name in names) for feature, names in _FEATURES.items()}


def describe_cpu() -> str:
    """Return one phrase for the log: the instruction sets that matter for speed, and what they mean for ``--amp``."""
    features = cpu_features()
    if features is None:
        return f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    advice = "--amp bf16 is native" if features["bf16"] else "no native bf16: train in float32"
    return f"CPU with {', '.join(name for name, has in features.items() if has) or 'no vector units'} ({advice})"


def available_memory() -> int:
    """Return the bytes of memory that this machine can still give to programs, without regard to a container's limit.

    The page cache that can be given up counts as available where the system tells, on Linux.
    """
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Return the bytes of memory that this machine, or the container that limits it, can still give to programs.

    What a container uses holds its page cache. As Docker and Kubernetes do, the part that was not used for a while
    (``inactive_file``) is taken off, as the kernel gives it up where memory is wanted.
    """
    free = available_memory()
    limit, used, stat = (_CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        cache = re.search(r"^inactive_file (\d+)$", stat.read_text(), re.MULTILINE) if stat.is_file() else None
        free = min(free, int(limit.read_text()) - int(used.read_text()) + (int(cache[1]) if cache else 0))
    return free


def crowding_advice() -> str:
    """Return what to do where PyTorch's threads will wait for cores that other programs use, or an empty text.

    A thread of OpenMP that waits for the others keeps its core busy for a while. Where the core is wanted, that keeps
    the others waiting in turn: on two busy cores an update that takes 0.5 s with one thread took more than 8 s with
    two, and 1.0 to 1.6 s with OMP_WAIT_POLICY=PASSIVE.
    """
    threads, cores, load = torch.get_num_threads(), len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if threads == 1 or "OMP_WAIT_POLICY" in os.environ or load + threads < cores + 1:
        return ""
    return (
        f"the load is {load:.1f} on {cores} cores, and this program takes {threads} threads: start it with "
        "OMP_WAIT_POLICY=PASSIVE, or with fewer threads (OMP_NUM_THREADS), or it may become several times slower"
    )
