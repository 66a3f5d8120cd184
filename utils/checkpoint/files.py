"""Checkpoint files: written so that nothing half-written is ever visible, read so that nothing in them is executed.

This is the only module of the project that unpickles. Every file, our own included, is opened in PyTorch's weights-only
mode with one addition: the yacs node inside the published checkpoints is read as a plain ordered dict. There is no
switch that turns the protection off.
"""

import collections
import hashlib
import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from utils.errors import CheckpointError
from utils.runtime import atomic_file, link_or_copy

logger = logging.getLogger(__name__)

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02"  # pickle protocol 2: PyTorch's format before 1.6
# The published checkpoints hold their config as a pickled yacs node. Naming OrderedDict under the node's name reads
# it as a mapping, without importing yacs.
_ALLOWED_GLOBALS = [(collections.OrderedDict, "yacs.config.CfgNode")]


def write_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` to ``path`` atomically and durably, and read it back before it becomes visible.

    What was written is verified (checksum of every member, loads weights-only) before it is renamed: whatever happens,
    ``path`` is either the old file or the complete new one.

    Args:
        path: final name; its folder exists.
        payload: tensors and plain types only.

    Raises:
        CheckpointError: the disk is full, a value cannot be pickled or would not load weights-only, ...
    """
    size = 0
    try:
        with atomic_file(path) as temporary:
            try:
                with open(temporary, "wb") as file:
                    torch.save(payload, file)
            finally:
                size = temporary.stat().st_size if temporary.exists() else 0
            verify_checkpoint(temporary)
    except CheckpointError as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error}") from error
    except Exception as error:
        reason = _root_reason(error)
        raise CheckpointError(f"cannot write checkpoint {path} (after {size:,} bytes): {reason}") from error


def link_checkpoint(source: Path, name: str) -> Path:
    """Give the file ``source`` a second name in its folder, atomically; copy it where links are not possible.

    Raises:
        CheckpointError: the file could not be linked or copied.
    """
    target = source.with_name(name)
    try:
        with atomic_file(target) as temporary:
            link_or_copy(source, temporary)
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {target}: {error}") from error
    return target


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check that ``path`` is a complete checkpoint and return its contents with tensors on the meta device.

    Raises:
        CheckpointError: missing, empty, truncated, damaged (a checksum is wrong), or not loadable weights-only.
    """
    return load_checkpoint(path, map_location="meta", strict=True)


def load_checkpoint(path: str | Path, *, map_location: str = "cpu", strict: bool = False) -> dict[str, Any]:
    """Open a file of unknown origin, after checking it whole, without running anything from it.

    Accepts PyTorch's zip and legacy formats and safetensors (recognised by content, whatever the name). A safetensors
    file comes back as ``{"model": tensors, "metadata": ...}``.

    Args:
        path: the file.
        map_location: 'cpu', or 'meta' to read names and shapes only.
        strict: refuse an archive without checksums, which this project never writes, instead of warning.

    Raises:
        CheckpointError: the file is missing, empty, damaged, not a checkpoint, or asks to import code that is not on
            the allow-list; the message names the file and what was found.
    """
    path = Path(path)
    kind = _check_magic(path)
    if kind == "safetensors":
        return _load_safetensors(path, map_location)
    if kind == "zip":
        _check_members(path, strict=strict)
    try:
        with torch.serialization.safe_globals(_ALLOWED_GLOBALS):
            payload = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path} holds a {type(payload).__name__}, not a checkpoint (a dict)")
    return payload


def first_nonfinite(tensors: dict[str, Tensor]) -> str | None:
    """Return the name of the first floating-point tensor with an infinite or undefined entry, or None."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_source(source: str) -> Path:
    """Return the local file behind ``source``: a path, or ``https://...#sha256=<64 hex digits>``.

    A download goes to PyTorch's hub folder, is verified against the checksum before it gets its name, and is
    verified again each time it is used.

    Raises:
        ValueError: a URL without checksum or not https.
        FileNotFoundError: the path does not exist.
        CheckpointError: the download's checksum differs.
    """
    if "://" not in source:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {source!r} does not exist or is not a file")
        return path
    url, _, digest = source.partition("#sha256=")
    digest = digest.lower()
    if not url.startswith("https://") or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(
            f"{source!r}: a checkpoint from the network needs https and its checksum, "
            "as https://host/file.pth#sha256=<64 hex digits>"
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{digest}.pth"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot download {url}: {error}") from error
    if sha256(path) != digest:
        raise CheckpointError(f"{path} does not have the checksum {digest}; delete it to download it again")
    return path


def _check_magic(path: Path) -> str:
    """Return 'zip', 'legacy' or 'safetensors' by the first bytes; raise CheckpointError for anything else."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes)")
    if head.startswith(_ZIP_MAGIC):
        return "zip"
    if head.startswith(_LEGACY_MAGIC):
        return "legacy"
    header = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and 2 <= header <= size - 8:
        return "safetensors"
    hint = ""
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        hint = "; this is a web page: the download link asks for a login or has moved"
    elif head.startswith(b"version https://"):
        hint = "; this is a git-lfs pointer: fetch the file itself with git lfs pull"
    raise CheckpointError(f"{path} is not a PyTorch checkpoint (starts with {head!r}){hint}")


def _check_members(path: Path, *, strict: bool) -> None:
    """Compare every member of a zip archive with its checksum; ``strict`` also refuses archives without checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                # PyTorch never compresses; a small file could expand to more than the memory holds
                raise CheckpointError(f"{path} was not opened: its members are compressed, PyTorch writes them plain")
            if all(info.CRC == 0 for info in archive.infolist() if info.file_size):
                # torch.serialization.set_crc32_options(False): legitimate in a stranger's file, never in ours
                bad = "every member" if strict else None
                logger.warning("%s was written without checksums: damage would go unnoticed", path)
            else:
                bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    if bad is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its member {bad!r} is wrong")


def _load_safetensors(path: Path, map_location: str) -> dict[str, Any]:
    device = "cpu" if map_location == "meta" else map_location
    try:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return {"model": tensors, "metadata": metadata}


def _refusal(path: Path, error: pickle.UnpicklingError) -> str:
    """Return the message for a pickle that needs more than plain types, without the advice to open it anyway."""
    try:
        wanted = sorted(
            set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {name for _, name in _ALLOWED_GLOBALS}
        )
    except (RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
        wanted = []
    wanted = wanted or re.findall(r"(?:GLOBAL|Trying to load unsupported GLOBAL) ([\w.]+)", str(error))[:1]
    if wanted:
        return (
            f"{path} was not opened: it asks to import {', '.join(wanted)}, which could run code on this machine. "
            "Ask its author for a file with tensors only (a state_dict or safetensors)"
        )
    return f"{path} is damaged or not a checkpoint: it is a pickle that PyTorch's weights-only mode cannot read"


def _root_reason(error: BaseException) -> str:
    """Return the reason of a failed write: the system's error wherever it is in the chain, else the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return f"[errno {cause.errno}] {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"
