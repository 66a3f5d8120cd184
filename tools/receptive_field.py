"""Effective receptive fields: how far the input reaches the centre of a stage's map, and how it is spread."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from tools.common import shortened
from tools.figures import grid, put_title
from utils.errors import RunError


class Stage(NamedTuple):
    """A module whose output is a map, the map's channels, and the pixels of the input to one of its rows."""

    module: nn.Module
    channels: int
    reduction: int


def stages_of(model: nn.Module) -> list[Stage]:
    """Return the last four stages.

    Raises:
        RunError: the network does not name them, as timm's do in ``feature_info``.
    """
    info = getattr(model, "feature_info", None)
    if not info:
        raise RunError(
            f"{type(model).__name__} does not say what its stages are (feature_info); choose another network"
        )
    entries = getattr(info, "info", info)[-4:]
    return [Stage(model.get_submodule(entry["module"]), entry["num_chs"], entry["reduction"]) for entry in entries]


def receptive_fields(model: nn.Module, batches: Iterator[Tensor]) -> list[Tensor]:
    """Return each stage's effective receptive field, (H, W) in the pixels of the input.

    As RepLKNet's ``erf/visualize_erf.py``: the positive part of the gradient, by the input, of the summed positive
    values of the centre unit; summed over channels, mean over images.

    Args:
        model: in evaluation mode.
        batches: normalised images (B, 3, H, W).
    """
    stages, maps, sums, count = stages_of(model), {}, [], 0
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, number=number: maps.update({number: output}))
        for number, (module, *_) in enumerate(stages)
    ]
    try:
        for images in batches:
            images.requires_grad_(True)
            model(images)
            fields = []
            for number, (_, channels, _) in enumerate(stages):
                found = as_map(maps[number], channels)
                unit = found[:, :, found.shape[2] // 2, found.shape[3] // 2].relu().sum()
                gradient = torch.autograd.grad(unit, images, retain_graph=number + 1 < len(stages))[0]
                fields.append(gradient.relu().sum(dim=(0, 1)).double().cpu())
            sums = [old + new for old, new in zip(sums, fields, strict=True)] if sums else fields
            count += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [field / count for field in sums]


def as_map(output: Tensor, channels: int) -> Tensor:
    """Return a stage's output as a map (B, C, H, W); it may be (B, H, W, C), or tokens (B, N, C) of a square grid."""
    if output.ndim == 3:  # tokens of classes come first
        side = math.isqrt(output.shape[1])
        output = output[:, output.shape[1] - side * side :].unflatten(1, (side, side))
    return output if output.shape[1] == channels else output.permute(0, 3, 1, 2)


def area_ratio(field: Tensor, share: float) -> float:
    """Return the share of the area of the smallest centred square that holds ``share`` of ``log10(field + 1)``.

    As RepLKNet's ``erf/analyze_erf.py``, which takes the logarithm before it adds up.
    """
    values = (field + 1).log10()
    height, width = values.shape
    for half in range(max(height, width)):
        rows = slice(max(0, height // 2 - half), height // 2 + half + 1)
        columns = slice(max(0, width // 2 - half), width // 2 + half + 1)
        square = values[rows, columns]
        if square.sum() >= share * values.sum():
            return square.numel() / values.numel()
    return 1.0


def draw_fields(fields: dict[str, list[Tensor]]) -> Figure:
    """Return the fields on a logarithmic scale, networks in rows, stages in columns."""
    columns = max(map(len, fields.values()))
    figure, axes = grid(len(fields), columns, lines=4)
    scale = ScalarMappable(LogNorm(1e-4, 1), "inferno")
    for row, (name, stages) in enumerate(fields.items()):
        for stage, field in enumerate(stages):
            ax = axes[row * columns + stage]
            scaled = (field / field.max().clamp(min=1e-30)).clamp(min=1e-4)
            ax.imshow(scaled.numpy(), norm=scale.norm, cmap=scale.cmap, interpolation="nearest")
            half, most = (100 * area_ratio(field, share) for share in (0.5, 0.99))
            areas = f"50 %: {half:.1f} % of the area", f"99 %: {most:.1f} % of the area"
            put_title(ax, "\n".join((shortened(name, 34), f"stage {stage + 1}", *areas)))
    figure.colorbar(scale, ax=axes, label="contribution, of the largest", aspect=15 * len(fields), pad=0.01)
    return figure
