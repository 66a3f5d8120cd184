"""Checkpoint files: written so that nothing half-written is ever visible, read so that nothing in them is executed.

Every file, our own included, is read by ``utils.checkpoint.pickled``, which builds tensors and plain types and nothing
else, with two additions: the yacs node inside the published checkpoints is read as a plain ordered dict, and classes of
other projects as inert stand-ins. There is no switch that turns the protection off.

A checkpoint holds a digest of its own values. It is compared with what was loaded, so that what is verified is what is
used. It detects damage; it is no signature.
"""

import collections
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from utils.checkpoint.archive import Archive, open_archive, tensor_crc
from utils.checkpoint.foreign import refused_names
from utils.checkpoint.pickled import TensorSpec, Unknown
from utils.errors import CheckpointError
from utils.runtime import atomic_file, link_or_copy

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02"  # pickle protocol 2: PyTorch's format before 1.6
# The published checkpoints hold their config as a pickled yacs node. Naming OrderedDict under the node's name reads
# it as a mapping, without importing yacs.
_ALLOWED_GLOBALS = [(collections.OrderedDict, "yacs.config.CfgNode")]
WEIGHTS_FILE = "model.safetensors"  # of a folder in timm's layout
METADATA_KEY = "strip_mlp"  # of a safetensors file: JSON of the plain entries that a checkpoint has
_DIGEST = "digest"
_DIGEST_KIND = "sha256-of-crc32:"
_MAX_DEPTH, _MAX_VALUES = 64, 3_000_000  # of a checkpoint; lists within themselves have no end


def write_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` to ``path`` atomically and durably, and read it back before it becomes visible.

    What was written is verified (it loads, and its values are the ones of ``payload`` by their digest) before it is
    renamed: whatever happens, ``path`` is either the old file or the complete new one.

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
                    torch.save({**payload, _DIGEST: payload_digest(payload, tensor_crc)}, file)
            finally:
                size = temporary.stat().st_size if temporary.exists() else 0
            verify_checkpoint(temporary)
    except CheckpointError as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error}") from error
    except Exception as error:
        reason = _root_reason(error)
        raise CheckpointError(
            f"cannot write checkpoint {path} (after {size:,} bytes): {reason}; earlier files are as they "
            "were. Make room, or see to the disk, then repeat the command"
        ) from error


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
        CheckpointError: missing, empty, truncated, damaged (a checksum or the digest is wrong), or not loadable.
    """
    return load_checkpoint(path, map_location="meta", strict=True)


def load_checkpoint(path: str | Path, *, map_location: str = "cpu", strict: bool = False) -> dict[str, Any]:
    """Open a file of unknown origin, after checking it whole, without running anything from it.

    Accepts PyTorch's zip and legacy formats and safetensors (recognised by content, whatever the name). A safetensors
    file comes back as ``{"model": tensors, "metadata": ...}``, with the plain entries of ``METADATA_KEY`` beside them.

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
    known = {name: function for function, name in _ALLOWED_GLOBALS}
    try:
        with open(path, "rb") as file:
            archive = open_archive(path, file, known, zipped=kind == "zip", strict=strict)
            return _contents(archive, map_location, strict=strict)
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error


def _contents(archive: Archive, map_location: str, *, strict: bool) -> dict[str, Any]:
    """Return the values of an opened archive, after comparing them with its digest."""
    path, tree = archive.path, archive.tree
    ours = isinstance(tree, dict) and _DIGEST in tree  # ours name no classes
    refused = sorted(archive.unknown) if ours else refused_names(archive.unknown)
    if strict and archive.unknown and not refused:
        raise CheckpointError(
            f"{path} was not written by this project (it holds {', '.join(sorted(archive.unknown))}) and cannot be "
            "resumed; start from its weights with --pretrained"
        )
    if refused:
        raise CheckpointError(
            f"{path} was not opened: it asks to import {', '.join(refused)}, which could run code on "
            "this machine. Ask its author for a file with tensors only (a state_dict or safetensors)"
        )
    if not isinstance(tree, dict):
        kind = "Tensor" if isinstance(tree, TensorSpec) else type(tree).__name__
        advice = ""
        if isinstance(tree, Unknown):
            kind, advice = tree.name, "; if that is a model, save its state_dict() instead"
        raise CheckpointError(f"{path} holds a {kind}, not a checkpoint (a dict){advice}")
    meta = map_location == "meta"
    payload = _settled(archive, lambda spec, entry: _on_meta(spec) if meta else archive.tensor(spec, entry))
    digest = tree.get(_DIGEST)
    if isinstance(digest, str) and digest.startswith(_DIGEST_KIND):
        del payload[_DIGEST], tree[_DIGEST]
        if payload_digest(tree, archive.crc) != digest:
            raise CheckpointError(f"{path} is damaged: its values are not those that were saved (by their digest)")
    elif meta:
        archive.check_places()
    return payload


def _on_meta(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.size, dtype=spec.dtype, device="meta")


def _settled(archive: Archive, resolve: Callable[[TensorSpec, str], Tensor]) -> dict[str, Any]:
    """Return the tree of an archive with tensors in it; refuse one that has no end or hides its size."""
    count = 0

    def settle(node: Any, entry: str, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > _MAX_VALUES or depth > _MAX_DEPTH:
            raise CheckpointError(
                f"{archive.path} is not read: {entry[:60]}...: more values, or deeper, than any state"
            )
        if isinstance(node, TensorSpec):
            count += 10  # a tensor takes more memory than a number
            return resolve(node, entry)
        if isinstance(node, Unknown) and node.items:
            return settle(node.items, entry, depth + 1)
        if isinstance(node, dict):
            items = {
                key: settle(value, f"{entry}.{key}" if entry else str(key), depth + 1) for key, value in node.items()
            }
            return type(node)(items) if type(node) in (dict, collections.OrderedDict) else items
        if type(node) in (list, tuple):
            return type(node)(settle(value, f"{entry}[{i}]", depth + 1) for i, value in enumerate(node))
        if isinstance(node, (str, bytes)):
            count += len(node) // 64
        return node

    return settle(archive.tree, "", 0)


def payload_digest(tree: Any, crc_of: Callable[[Any], int]) -> str:
    """Return the digest of a checkpoint's values: names, types, shapes, plain values and the bytes of tensors.

    Args:
        tree: nested dicts, lists and tuples of tensors (or ``TensorSpec``) and plain values.
        crc_of: gives the CRC-32 of a tensor's bytes.
    """

    def parts(node: Any) -> Iterator[str]:
        if isinstance(node, Tensor):
            yield f"{node.dtype} {tuple(node.shape)} {crc_of(node)}"
        elif isinstance(node, TensorSpec):
            yield f"{node.dtype} {node.size} {crc_of(node)}"
        elif isinstance(node, dict):
            yield f"dict {len(node)}"
            for key, value in node.items():
                yield repr(key)
                yield from parts(value)
        elif isinstance(node, (list, tuple)):
            yield f"{'list' if isinstance(node, list) else 'tuple'} {len(node)}"
            for value in node:
                yield from parts(value)
        else:
            yield f"{type(node).__name__} {node!r}"

    digest = hashlib.sha256()
    for part in parts(tree):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return _DIGEST_KIND + digest.hexdigest()


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

    A folder that tools/export.py wrote, in timm's layout, stands for the weights in it. A download goes to PyTorch's
    hub folder, is verified against the checksum before it gets its name, and is verified again each time it is used.

    Raises:
        ValueError: a URL without checksum or not https.
        FileNotFoundError: the path does not exist.
        CheckpointError: the download's checksum differs.
    """
    if "://" not in source:
        path, advice = Path(source), ""
        if path.is_dir():
            path /= WEIGHTS_FILE
            advice = f"; of a folder, name a file in it, unless it has the {WEIGHTS_FILE} of tools/export.py"
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {source!r} does not exist or is not a file{advice}")
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
        except OSError as error:
            raise CheckpointError(
                f"cannot download {url}: {error}; check the address, or fetch the file elsewhere and give its path"
            ) from error
        except RuntimeError as error:
            raise CheckpointError(
                f"cannot download {url}: {error}; there is another file now, or #sha256= is wrong"
            ) from error
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


def _load_safetensors(path: Path, map_location: str) -> dict[str, Any]:
    device = "cpu" if map_location == "meta" else map_location
    try:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    about = metadata.pop(METADATA_KEY, "{}")
    try:
        own = json.loads(about)
        if not isinstance(own, dict):
            raise ValueError("it is not a mapping")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: what it says about itself cannot be read: {error}") from error
    return {**own, "model": tensors, "metadata": metadata}


def _root_reason(error: BaseException) -> str:
    """Return the reason of a failed write: the system's error wherever it is in the chain, else the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return f"[errno {cause.errno}] {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"
