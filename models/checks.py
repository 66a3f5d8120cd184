"""What can be known of a model before it is built: tried once without memory, on PyTorch's meta device."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from .build import build_model

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# Mixed precision and the forms of ``models.fast`` keep less for the backward pass than was counted here.
_LEAST_KEPT_SHARE = 0.25


def check_model(config: "CfgNode", device: torch.device, *, training: bool = True) -> int:
    """Build the model of the config and pass one batch through it, without memory and without random numbers.

    Args:
        config: the configuration.
        device: where the run computes, for the size of its memory.
        training: as in training, with what is kept for the backward pass; else as in evaluation.

    Returns:
        An estimate of the bytes that it needs, on the high side; 0 if the model cannot be tried in this way.

    Raises:
        ValueError: the model cannot be built or run, or needs more memory than there is; the keys are named.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), _silenced(build_model.__module__):
            num_classes = config.MODEL.NUM_CLASSES or 1  # 0: not known yet, and of little weight
            model = build_model(config, num_classes).train(training)
            kept = _kept_bytes(model, config, training=training)
    except Exception as error:  # whatever a model of timm raises
        reason = _reason(error)
        if not isinstance(error, ValueError) and re.search(r"\bmeta\b", reason, re.IGNORECASE):
            logger.debug("%s cannot be tried in advance: %s", _keys(config), reason)
            return 0
        raise ValueError(_problem(config, error, reason)) from error
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    moments = 2 if config.TRAIN.OPTIMIZER.NAME == "adamw" else 1
    copies = 2 + moments + (config.TRAIN.EMA_DECAY > 0) if training else 1  # weights, gradients, moments, average
    needed, memory = weights * copies + int(kept * _LEAST_KEPT_SHARE), _memory_of(device)
    if needed > memory:
        raise ValueError(
            f"{_keys(config)} with DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} and MODEL.NUM_CLASSES "
            f"{config.MODEL.NUM_CLASSES} needs at least {needed / 1e9:,.1f} GB of memory, but {device} has "
            f"{memory / 1e9:,.1f} GB; take a smaller model, image or batch"
        )
    return weights * copies + kept


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Keep back what building logs; it is logged when the model is built to be used."""
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _kept_bytes(model: nn.Module, config: "CfgNode", *, training: bool) -> int:
    """Run the forward pass of one batch on the meta device; return the bytes kept for the backward pass."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    batch = torch.empty(config.DATA.BATCH_SIZE, config.MODEL.STRIP_MLP.IN_CHANS, *to_2tuple(config.DATA.IMG_SIZE))
    with torch.set_grad_enabled(training), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = model(batch)
    if not isinstance(scores, Tensor) or scores.shape != (config.DATA.BATCH_SIZE, model.num_classes):
        raise ValueError("it does not return one score per class for each image")
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _problem(config: "CfgNode", error: Exception, reason: str) -> str:
    if "more than 1 value per channel" in reason:
        return (
            f"DATA.BATCH_SIZE is {config.DATA.BATCH_SIZE}, but BatchNorm needs more than one value per channel in "
            f"training, and the smallest maps at DATA.IMG_SIZE {config.DATA.IMG_SIZE} have one pixel; take a "
            "DATA.BATCH_SIZE of at least 2, or larger images"
        )
    if config.TRAIN.USE_CHECKPOINT and "checkpointing" in reason:
        return (
            f"TRAIN.USE_CHECKPOINT (--use-checkpoint) is True, but MODEL.TIMM_NAME {config.MODEL.TIMM_NAME} does not "
            "support it; switch it off"
        )
    if isinstance(error, ValueError) and reason.startswith(("MODEL.", "TRAIN.")):
        return reason
    return f"{_keys(config)} cannot be used: {reason}"


def _keys(config: "CfgNode") -> str:
    """Return the keys that decide about the model's shapes, with their values."""
    strip = config.MODEL.STRIP_MLP
    if config.MODEL.TYPE == "timm":
        kwargs = f", MODEL.TIMM_KWARGS {config.MODEL.TIMM_KWARGS}" if config.MODEL.TIMM_KWARGS else ""
        model = f"MODEL.TIMM_NAME {config.MODEL.TIMM_NAME}{kwargs}"
    else:
        model = f"MODEL.STRIP_MLP.EMBED_DIM {strip.EMBED_DIM}, LAYERS {list(strip.LAYERS)}"
    return f"{model} at DATA.IMG_SIZE {config.DATA.IMG_SIZE}, MODEL.STRIP_MLP.IN_CHANS {strip.IN_CHANS}"


def _reason(error: Exception) -> str:
    """Return the first line of an error's text, shortened, or its kind."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 300 else f"{lines[0][:300]} ..."


def _memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of this machine or the container that limits it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(memory, int(limit)) if limit.isdigit() else memory
