"""What strip mixing has learned, as maps: the strip weights and the tables of relative positions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from torch import Tensor, nn

from models import StripMLPNet
from tools.figures import grid, put_title


class Map(NamedTuple):
    """A map to draw: its title, its values (rows, columns), and the largest magnitude of its colour scale."""

    title: str
    values: Tensor
    limit: float


def draw_strips(model: StripMLPNet) -> Figure:
    """Return the strip weights of each stage's last block: mean magnitude over the channels, output by input token."""
    maps = []
    for stage, cgsmm in last_blocks(model):
        for line, layer in (("row", cgsmm.row_mix), ("column", cgsmm.column_mix)):
            weight = layer.mix.weight.detach().cpu().squeeze(2)  # (G * W', W, 1, 3) -> (G * W', W, 3)
            means = weight.unflatten(0, (layer.mix.groups, -1)).abs().mean(dim=0)  # -> (G, W', W, 3) -> (W', W, 3)
            names = (f"{line} before", f"own {line}", f"{line} after")
            parts = zip(names, means.unbind(2), strict=True)
            maps += [Map(f"{stage}, {name}: 0 to {means.max():.2g}", part, means.max().item()) for name, part in parts]
    return draw_maps(maps, 6, "viridis", "Strip weights: output (down) by input token (across), from dark to bright")


def draw_positions(model: StripMLPNet) -> Figure:
    """Return the relative position tables of each stage's last block: offset by channel."""
    maps = []
    for stage, cgsmm in last_blocks(model):
        for lines, position in (("rows", cgsmm.row_position), ("columns", cgsmm.column_position)):
            table = position.table.detach().cpu()
            limit = table.abs().max().item()
            maps.append(Map(f"{stage}, {lines}: ± {limit:.2g}", table, limit))
    title = "Position tables: offset (down) by channel\n(across), red negative, blue positive"
    return draw_maps(maps, 2, "RdBu", title, signed=True)


def last_blocks(model: StripMLPNet) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name of each stage, and the strip mixing along rows and columns of its last block."""
    for number, stage in enumerate(model.stages, start=1):
        yield f"stage {number}", stage[-1].strip_mixing.cgsmm


def draw_maps(maps: Sequence[Map], columns: int, colours: str, title: str, *, signed: bool = False) -> Figure:
    """Return the maps row by row, each on a colour scale of its own, from 0 or the negative limit."""
    figure, axes = grid(-(-len(maps) // columns), columns)
    figure.suptitle(title, fontsize=9)
    for ax, one in zip(axes, maps, strict=False):
        low = -one.limit if signed else 0
        ax.imshow(one.values, cmap=colours, vmin=low, vmax=one.limit, aspect="auto", interpolation="nearest")
        put_title(ax, one.title)
    return figure
