"""The optimizer of the published recipe, fused: weight decay on matrices only."""

import logging
from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from yacs.config import CfgNode

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


def build_optimizer(config: CfgNode, model: nn.Module, lr: float) -> Optimizer:
    """Build the optimizer of ``TRAIN.OPTIMIZER`` at learning rate ``lr``.

    AdamW and SGD run in their fused form: one kernel for all parameters, and a skipped update needs no synchronisation
    with the host (see ``utils.training.guard``).

    Raises:
        ValueError: the optimizer's name is unknown, or the model has no trainable parameter.
    """
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups(model, config.TRAIN.WEIGHT_DECAY, skip)
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    if sum(counts) == 0:
        raise ValueError("the model has no trainable parameter; unfreeze at least its head")
    logger.info(
        "optimizer: %s parameters with weight decay %g, %s without",
        f"{counts[0]:,}",
        config.TRAIN.WEIGHT_DECAY,
        f"{counts[1]:,}",
    )
    options = config.TRAIN.OPTIMIZER
    name = options.NAME.lower()
    if name == "adamw":
        return AdamW(groups, lr=lr, eps=options.EPS, betas=tuple(options.BETAS), fused=True)
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=options.MOMENTUM, nesterov=options.MOMENTUM > 0, fused=True)
    raise ValueError(f"TRAIN.OPTIMIZER.NAME is {options.NAME!r}; known: adamw, sgd")
