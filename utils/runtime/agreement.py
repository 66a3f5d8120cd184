"""Whether the processes of a run agree on what they are about to do.

Nothing in distributed training notices that they do not: gradients are averaged, and each process applies them with its
own learning rate. What must be equal is compared once, before anything depends on it. Every process gets the same
answer, so that all go on or all end.
"""

import hashlib
import json
import logging
import platform
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import PIL
import timm
import torch
import torchvision
from yacs.config import CfgNode

from utils.config import KEYS, flatten
from utils.errors import RunError
from utils.runtime.distributed import gather_objects, get_world_size, is_main_process
from utils.runtime.hardware import describe_cpu

logger = logging.getLogger(__name__)

Facts = Callable[[], Mapping[str, Any]]

SAME_START = "start every process with the same command line, config files, code and packages"
SAME_FILES = "give every host the same files"
_ROOT = Path(__file__).resolve().parents[2]
_SHOWN, _SHOWN_PLACES, _SHOWN_LETTERS = 12, 4, 80
# Keys that suit a host and change neither the training nor who waits for whom. Everything else has to be equal.
HOST_KEYS = frozenset(
    {
        "DATA.NUM_WORKERS",  # cores of the host
        "DATA.PIN_MEMORY",
        "DATA.LOADER_TIMEOUT",  # speed of its storage
        "DATA.CACHE_MODE",  # its memory; the pixels are the same
        "DATA.CACHE_DECODED",
        "DATA.DOWNLOAD",  # the files may lie there already
        "OUTPUT",  # a disk of its own
        "LOGGER",  # read by rank 0 alone
    }
)


def start_facts(config: CfgNode, device: torch.device) -> dict[str, Any]:
    """Return what all processes must have in common: settings, code, versions, kind of device.

    A path may differ from host to host, but it is given everywhere or nowhere. PyTorch and timm must be of one version:
    their kernels and defaults differ between releases, and nothing brings weights that have drifted apart together.
    """
    settings = {
        key: ("given" if value else "not given") if KEYS[key].is_path else value
        for key, value in flatten(config).items()
        if key not in HOST_KEYS
    }
    code = {f"code of {name}": digest for name, digest in code_digests(_ROOT).items()}
    versions = {"version of torch": str(torch.__version__), "version of timm": timm.__version__}
    return {**settings, **code, **versions, "kind of device": device.type}


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what had better be the same on all hosts, as it may round or resize differently in the last bit."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else describe_cpu(),
        "version of Python": platform.python_version(),
        "version of numpy": numpy.__version__,
        "version of torchvision": torchvision.__version__,
        "version of Pillow": PIL.__version__,
    }


def code_digests(root: Path) -> dict[str, str]:
    """Return the start of the SHA-256 of every source file that a run imports, by its path below ``root``.

    The files tell more than a commit does: they may have been edited, or copied without the repository.
    """
    files = [
        *root.glob("*.py"),
        *(file for part in ("data", "models", "utils") for file in (root / part).rglob("*.py")),
    ]
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in sorted(files)
    }


def require_agreement(facts: Facts, *, remedy: str, advisory: Facts = dict) -> None:
    """Compare facts over all processes. Collective; one exchange of a checksum where all agree.

    Args:
        facts: returns name -> value that JSON can hold; one process alone does not call it.
        remedy: what to do about differences, for the error.
        advisory: returns facts that are only warned about.

    Raises:
        RunError: some differ, on every process alike; names each with its values and where they were found.
    """
    if get_world_size() == 1:
        return
    both = [json.dumps(part(), default=list) for part in (facts, advisory)]
    if len(set(gather_objects(hashlib.sha256("\n".join(both).encode()).digest()))) == 1:
        return
    host = socket.gethostname()
    rows = gather_objects((host, *(json.loads(part) for part in both)))
    hosts = [row[0] for row in rows]
    lines = _differences(hosts, [row[1] for row in rows])
    if lines:
        raise RunError("\n".join(["the processes of this run disagree:", *lines, f"  {remedy}"]))
    if is_main_process():
        for line in _differences(hosts, [row[2] for row in rows]):
            logger.warning("the hosts differ, and may round differently: %s", line.strip())


def _differences(hosts: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each name whose values differ, at most ``_SHOWN`` and the number of the others."""
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row):
        places: dict[str, list[int]] = {}
        for rank, row in enumerate(rows):
            places.setdefault(_text(row[name]) if name in row else "nothing", []).append(rank)
        if len(places) > 1:
            values = ", ".join(f"{value} on {_where(ranks, hosts)}" for value, ranks in places.items())
            lines.append(f"  {name}: {values}")
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], f"  and {more} more"]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


def _where(ranks: Iterable[int], hosts: list[str]) -> str:
    """Return processes by host, such as ``rank 0 (gpu-17), rank 8 (gpu-18)``."""
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    texts = [f"rank{'s' * (len(own) > 1)} {' '.join(own)} ({host})" for host, own in by_host.items()]
    more = len(texts) - _SHOWN_PLACES
    return ", ".join(texts if more <= 0 else [*texts[:_SHOWN_PLACES], f"{more} more hosts"])
