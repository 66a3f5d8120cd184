"""The state of a training run: how it is collected for a checkpoint and put back."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch.optim import Optimizer

from utils.checkpoint.files import first_nonfinite, load_checkpoint
from utils.checkpoint.schema import SchemaFault, check_state, fitting
from utils.errors import CheckpointError
from utils.runtime import gather_objects, get_rank, get_world_size, random_state, set_random_state
from utils.training import Progress, TrainState, averaged_batchnorm, batchnorm_buffers, is_fused, kept_state

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


def capture(state: TrainState, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the state as tensors and plain types. Collective.

    ``model`` and ``ema`` hold BatchNorm statistics averaged over the processes, for whoever evaluates the file;
    ``rank_state`` holds each process's own, with its random streams, for the exact continuation.

    Args:
        state: the live state.
        metadata: further plain entries: config text, class names, preprocessing, ...
    """
    ema = state.ema.module if state.ema is not None else None
    own = {"rng": random_state(), "buffers": _cpu(batchnorm_buffers(state.model)), "means": state.means.state()}
    if ema is not None:
        own["ema_buffers"] = _cpu(batchnorm_buffers(ema))
    rank_state = gather_objects(own)
    with averaged_batchnorm(state.model, ema):
        model_state, ema_state = _snapshot(state.model), None if ema is None else _snapshot(ema)
    return {
        "format_version": FORMAT_VERSION,
        "model": model_state,
        "ema": ema_state,
        "optimizer": state.optimizer.state_dict(),
        "lr": [group["lr"] for group in state.optimizer.param_groups],
        "scaler": state.scaler.state_dict(),
        "guard": state.guard.state_dict(),
        "progress": asdict(state.progress),
        "rank_state": rank_state,
        "world_size": get_world_size(),
        "versions": versions(state),
        **metadata,
    }


@torch.no_grad()
def host_copy(tree: Any) -> Any:
    """Return a copy of a captured state that training no longer changes: all tensors in the host's memory.

    Tensors that share a storage share its copy, and keep their strides: the file becomes the same, byte for byte.

    Args:
        tree: nested dicts, lists and tuples of tensors and plain values.
    """
    storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

    def copied(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            storage = node.untyped_storage()
            key = storage.device, storage.data_ptr()
            if key not in storages or not storage.nbytes():
                whole = torch.empty(0, dtype=torch.uint8, device=node.device).set_(storage)
                # from a GPU: into pinned memory, all transfers in a row
                storages[key] = whole.to("cpu", copy=True, non_blocking=True).untyped_storage()
            return torch.empty(0, dtype=node.dtype).set_(
                storages[key], node.storage_offset(), node.size(), node.stride()
            )
        if isinstance(node, dict):
            return {key: copied(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(map(copied, node))
        return node

    copy = copied(tree)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copy


def restore(state: TrainState, payload: dict[str, Any], path: Path) -> None:
    """Put ``payload`` into the live state.

    With the number of processes that saved it, the continuation is exact: each process gets its own BatchNorm
    statistics and random streams back. With another number they start from the averages, and this is logged, as is
    another version of PyTorch, kind of device or number of threads, which round differently. The optimizer's settings
    (decay, momenta) stay the live ones, so that a change that was allowed takes effect.

    Args:
        state: the live state.
        payload: what ``read_training_state`` returned.
        path: its file, for messages.

    Raises:
        CheckpointError: the file belongs to another model or optimizer; the live state is untouched.
    """
    _check_payload(state, payload, path)
    state.model.load_state_dict(payload["model"])
    if state.ema is not None:
        state.ema.module.load_state_dict(payload["ema"])
    _load_moments(state.optimizer, payload["optimizer"])
    if payload["scaler"]:
        state.scaler.load_state_dict(payload["scaler"])
    state.guard.load_state_dict(payload["guard"])
    state.progress = Progress(**payload["progress"])
    _warn_of_other_versions(payload.get("versions", {}), versions(state), path)
    if payload["world_size"] == get_world_size():
        own = payload["rank_state"][get_rank()]
        _copy_into(batchnorm_buffers(state.model), own["buffers"])
        if state.ema is not None:
            _copy_into(batchnorm_buffers(state.ema.module), own["ema_buffers"])
        state.means.load(own["means"])
        set_random_state(own["rng"])
    else:
        logger.warning(
            "%s was saved by %d process(es), this run has %d: BatchNorm statistics start from the average "
            "and random streams from the seed; the samples already seen in this epoch are not repeated",
            path,
            payload["world_size"],
            get_world_size(),
        )


def _warn_of_other_versions(then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for name in sorted(name for name in then.keys() & now.keys() if then[name] != now[name]):
        logger.warning(
            "%s was saved with %s %s, this is %s: the continuation is not exact to the last bit",
            path,
            name,
            then[name],
            now[name],
        )


def versions(state: TrainState) -> dict[str, Any]:
    """Return what the bits of a training depend on besides its recipe."""
    device = next(state.model.parameters()).device.type
    threads = {"threads": torch.get_num_threads()} if device == "cpu" else {}
    return {"torch": str(torch.__version__), "timm": timm.__version__, "device": device, **threads}


def read_training_state(path: Path) -> dict[str, Any]:
    """Open a checkpoint for resuming, after checking it whole.

    Raises:
        CheckpointError: damaged, not ours, of a newer format, or without an entry that a training state needs.
    """
    payload = load_checkpoint(path, strict=True)
    _check_format(payload, path)
    return payload


def _check_format(payload: dict[str, Any], path: Path) -> None:
    version = payload.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{path} was not written by this project and cannot be resumed; start from its weights with --pretrained"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this code reads up to {FORMAT_VERSION}. "
            f"It was written with {payload.get('versions')}: update this project"
        )
    try:
        check_state(payload)
    except SchemaFault as fault:
        raise CheckpointError(f"{path} is not a complete training state: {fault}") from None


def _check_payload(state: TrainState, payload: dict[str, Any], path: Path) -> None:
    if (state.ema is None) != (payload["ema"] is None):
        raise CheckpointError(
            f"{path} was saved {'without' if payload['ema'] is None else 'with'} averaged weights; "
            "set TRAIN.EMA_DECAY as in that run"
        )
    for live, saved in ((state.model, payload["model"]), (state.ema and state.ema.module, payload["ema"])):
        if live is not None:
            _check_tensors(live.state_dict(), saved, path)
    _check_optimizer(state.optimizer, payload["optimizer"], path)
    try:
        fitting(state, payload["progress"]["global_step"])(payload, "")
    except SchemaFault as fault:
        raise CheckpointError(f"{path} does not fit this run: {fault}") from None


def _check_tensors(own: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], path: Path) -> None:
    wrong = [
        f"{k}: {list(theirs[k].shape)} in the file, {list(own[k].shape)} here"
        for k in own
        if k in theirs and theirs[k].shape != own[k].shape
    ]
    wrong += [
        f"{k}: {theirs[k].dtype} in the file, {own[k].dtype} here"
        for k in own
        if k in theirs and theirs[k].dtype != own[k].dtype
    ]
    wrong += [f"{k}: only in the file" for k in theirs if k not in own]
    wrong += [f"{k}: not in the file" for k in own if k not in theirs]
    if wrong:
        raise CheckpointError(
            f"{path} belongs to another model ({len(wrong)} entries differ): "
            + "; ".join(wrong[:5])
            + ". To start from its weights use --pretrained"
        )
    bad = first_nonfinite(theirs)
    if bad is not None:
        raise CheckpointError(f"{path}: the entry {bad!r} has infinite or undefined values")


def _check_optimizer(optimizer: Optimizer, saved: dict[str, Any], path: Path) -> None:
    """Refuse the state of another optimizer, or of other parameter groups."""
    groups, own = saved["param_groups"], optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    same_kind = groups and ("betas" in groups[0]) == ("betas" in own[0])
    if sizes != [len(group["params"]) for group in own] or not same_kind:
        raise CheckpointError(f"{path} was saved with another optimizer; set TRAIN.OPTIMIZER as in that run")


def _load_moments(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Give the optimizer its moments back, each in memory of its own, laid out as its parameter; it keeps its settings.

    The fused kernels go through parameter and moments by address, whatever their strides. Some optimizers count their
    updates among the settings of a group; these counts come from the file too.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            name: torch.empty_like(parameters[index]).copy_(value)
            if torch.is_tensor(value) and value.shape == parameters[index].shape and name != "step"
            else value
            for name, value in entries.items()
        }
        for index, entries in saved["state"].items()
    }
    groups = optimizer.state_dict()["param_groups"]
    counters = [] if is_fused(optimizer) else kept_state(optimizer)[1]
    for group, names, theirs in zip(groups, counters, saved["param_groups"], strict=False):
        group.update({name: theirs[name] for name in names if name in theirs})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of a model, with copies of what ``averaged_batchnorm`` is about to put back."""
    return {**model.state_dict(), **{name: buffer.clone() for name, buffer in batchnorm_buffers(model).items()}}


def _cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@torch.no_grad()
def _copy_into(targets: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])
