"""Parts of a model that keep their weights while the rest is trained."""

from collections.abc import Iterator
from functools import partial

import torch
from timm.models import group_parameters
from torch import nn


def freeze(model: nn.Module, part: str) -> None:
    """Keep the weights of a part of the model, and keep it in evaluation mode, also after ``model.train()``.

    In evaluation mode, BatchNorm normalises by its running statistics and leaves them alone, and neither DropPath nor
    dropout drops anything.

    Args:
        model: has ``group_matcher`` and ``get_classifier``, as timm's models do. What its ``group_matcher`` puts into
            one coarse group counts as a stage: in a network without stages, a block.
        part: ``"stem"``, ``"stages1"`` (the stem and the first stage), ``"stages2"``, ... (and those up to it), or
            ``"head_only"``, which is all but the classifier.

    Raises:
        ValueError: the model does not say what its parts are, has not as many, or nothing would be left to train.
    """
    frozen = _all_but_head(model) if part == "head_only" else _up_to_stage(model, part)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"TRAIN.FREEZE {part} freezes all of {type(model).__name__}; nothing is left to train")
    model.train = partial(_train_unfrozen, model)  # not a closure: copies get their own
    model.train(model.training)


def frozen_parts(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules whose parameters are all frozen."""
    return [name for name, _ in _frozen_modules(model)]


def scale_head(model: nn.Module, factor: float) -> None:
    """Multiply the classifier's weights and biases by ``factor``."""
    with torch.no_grad():
        for module in _heads(model):
            for parameter in module.parameters():
                parameter.mul_(factor)


def _train_unfrozen(model: nn.Module, mode: bool = True) -> nn.Module:
    """Do what ``nn.Module.train`` does, but for what is frozen."""
    type(model).train(model, mode)
    for _, module in _frozen_modules(model):
        module.eval()
    return model


def _frozen_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that have parameters, all of them frozen, with their names."""
    for name, module in model.named_children():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            yield prefix + name, module
        else:
            yield from _frozen_modules(module, f"{prefix}{name}.")


def _heads(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the classifier; some of timm's models have two.

    Raises:
        ValueError: the model has no ``get_classifier``.
    """
    if not hasattr(model, "get_classifier"):
        raise ValueError(f"{type(model).__name__} does not say what its classifier is (get_classifier)")
    head = model.get_classifier()
    return tuple(head) if isinstance(head, (tuple, list)) else (head,)


def _all_but_head(model: nn.Module) -> set[str]:
    kept = {id(parameter) for head in _heads(model) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in kept}


def _up_to_stage(model: nn.Module, part: str) -> set[str]:
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            f"TRAIN.FREEZE {part}: {type(model).__name__} does not say what its stages are (group_matcher); take "
            "head_only or none"
        )
    groups = group_parameters(model, model.group_matcher(coarse=True))
    last = int(part.removeprefix("stages")) if part != "stem" else 0
    stages = len(groups) - 2  # the first group is the stem, the last one the head
    if last > stages:
        raise ValueError(f"TRAIN.FREEZE {part}: {type(model).__name__} has only {max(stages, 0)} stages")
    return {name for group in range(last + 1) for name in groups[group]}
