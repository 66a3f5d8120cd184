"""The optimizer: that of the published recipe in its fused form, or one of timm's by name."""

import copy
import inspect
import logging
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, param_groups_layer_decay
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from yacs.config import CfgNode

from utils.config import read_arguments

logger = logging.getLogger(__name__)


def param_groups(model: nn.Module, weight_decay: float, skip: Iterable[str] = ()) -> list[dict]:
    """Split the trainable parameters into two groups: with weight decay and without, in this order.

    Parameters of at most one dimension (norm scales), biases, and the names in ``skip`` are not decayed. The published
    recipe decays everything else, the GRN's gamma and beta and the position tables included.

    Args:
        model: the model; names are those of ``named_parameters``.
        weight_decay: decay of the first group.
        skip: full parameter names that are never decayed.
    """
    skip = set(skip)
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_free = parameter.ndim <= 1 or name.endswith(".bias") or name in skip
        (free if is_free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float, skip: Iterable[str] = ()) -> list[dict]:
    """Split the trainable parameters as ``param_groups`` does, and further into the slices of ``group_matcher``.

    A slice is the stem, a block or the head. Its groups hold ``lr_scale``, by which timm's schedules multiply the
    learning rate: 1 for the last slice, ``layer_decay`` for the one before it, and so on (BEiT, arXiv 2106.08254).

    Args:
        model: has ``group_matcher``, as timm's models do.
        weight_decay: decay of the parameters that are decayed.
        layer_decay: factor from one slice to the one before it, in (0, 1].
        skip: full parameter names that are never decayed.

    Raises:
        ValueError: the model has no ``group_matcher``; timm would cut it into slices across its blocks.
    """
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            f"TRAIN.LAYER_DECAY is {layer_decay:g}, but {type(model).__name__} does not say which parameters form a "
            "layer (group_matcher); set TRAIN.LAYER_DECAY 1.0"
        )
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=tuple(skip), layer_decay=layer_decay)


def build_optimizer(config: CfgNode, model: nn.Module, lr: float) -> Optimizer:
    """Build the optimizer of ``TRAIN.OPTIMIZER`` at learning rate ``lr``.

    AdamW and SGD run in their fused form: one kernel for all parameters, and a skipped update needs no synchronisation
    with the host (see ``utils.training.guard``). Every other optimizer is timm's.

    Raises:
        ValueError: the optimizer refuses ``TRAIN.OPTIMIZER.OPTIONS``, or the model has no trainable parameter.
    """
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    train, options = config.TRAIN, config.TRAIN.OPTIMIZER
    if train.LAYER_DECAY == 1.0:
        groups = param_groups(model, train.WEIGHT_DECAY, skip)
    else:
        groups = layer_groups(model, train.WEIGHT_DECAY, train.LAYER_DECAY, skip)
    _log_groups(groups, train.WEIGHT_DECAY)
    name = options.NAME.lower()
    if name == "adamw":
        return AdamW(groups, lr=lr, eps=options.EPS, betas=tuple(options.BETAS), fused=True)
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=options.MOMENTUM, nesterov=options.MOMENTUM > 0, fused=True)
    return _build_timm(name, groups, lr, read_arguments(options.OPTIONS))


def _log_groups(groups: list[dict], weight_decay: float) -> None:
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    if sum(counts) == 0:
        raise ValueError("the model has no trainable parameter; unfreeze at least its head")
    decayed = sum(count for count, group in zip(counts, groups, strict=True) if group["weight_decay"])
    logger.info(
        "optimizer: %s parameters with weight decay %g, %s without",
        f"{decayed:,}",
        weight_decay,
        f"{sum(counts) - decayed:,}",
    )
    scales = sorted({group.get("lr_scale", 1.0) for group in groups})
    if len(scales) > 1:
        logger.info("learning rate times %.3g in the first of %d layers, 1 in the last", scales[0], len(scales))


def _build_timm(name: str, groups: list[dict], lr: float, options: dict[str, Any]) -> Optimizer:
    """Build one of timm's optimizers with its own defaults, but for ``options``."""
    known = inspect.signature(get_optimizer_class(name, bind_defaults=False).__init__).parameters
    names = sorted(set(known) - {"self", "params", "lr", "weight_decay", "defaults"})
    problem = "" if options.keys() <= set(names) else f"it knows {', '.join(names)}"
    try:
        if not problem:  # timm would leave out some arguments that the optimizer does not know, without a word
            return create_optimizer_v2(groups, opt=name, lr=lr, **options)
    except (TypeError, ValueError, AssertionError) as error:
        problem = str(error)
    raise ValueError(f"TRAIN.OPTIMIZER.NAME {name} refuses TRAIN.OPTIMIZER.OPTIONS {options}: {problem}")


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's kernels read ``found_inf``, so that the host need not know of a skipped update."""
    return all(group.get("fused") for group in optimizer.param_groups)


def learning_rate(optimizer: Optimizer) -> float:
    """Return the learning rate of the layers at which it is not scaled down."""
    return max(group["lr"] for group in optimizer.param_groups)


def kept_state(optimizer: Optimizer) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """Return what an optimizer keeps of each parameter, and what it counts in each group, as after its first update.

    It is learned from an update of a copy; the optimizer and its parameters are left alone.
    """
    trial = copy.deepcopy(optimizer)
    for parameter in (p for group in trial.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    trial.step()
    before, after = optimizer.state_dict()["param_groups"], trial.state_dict()
    counters = [
        {name: value for name, value in new.items() if name not in old or bool(old[name] != value)}
        for old, new in zip(before, after["param_groups"], strict=True)
    ]
    return after["state"], counters
