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
            weight = layer.mix.weight.detach().cpu().squeeze(2)  # (G * W', W, 1, E) -> (G * W', W, E), E strip width
            means = weight.unflatten(0, (layer.mix.groups, -1)).abs().mean(dim=0)  # -> (G, W', W, E) -> (W', W, E)
            parts = zip(strip_names(line, means.shape[2]), means.unbind(2), strict=True)
            maps += [Map(f"{stage}, {name}: 0 to {means.max():.2g}", part, means.max().item()) for name, part in parts]
    title = "Strip weights: output (down) by input token (across), from dark to bright"
    return draw_maps(maps, len(maps) // len(model.stages), "viridis", title)


def strip_names(line: str, width: int) -> list[str]:
    """Return what each row (or column) of a strip is to a token, in order."""
    reach = width // 2
    lines = [line if distance == 1 else f"{distance} {line}s" for distance in range(1, reach + 1)]
    return [*(f"{one} before" for one in reversed(lines)), f"own {line}", *(f"{one} after" for one in lines)]


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
    """Yield the name of each stage, and the strip mixing along rows and columns of its last block.

    Raises:
        ValueError: if the network has none.
    """
    for number, stage in enumerate(model.stages, start=1):
        cgsmm = stage[-1].strip_mixing.cgsmm
        if isinstance(cgsmm, nn.Identity):
            raise ValueError("the network has no strips to draw: MODEL.STRIP_MLP.TOKEN_MIXING is lsmm")
        yield f"stage {number}", cgsmm


def draw_maps(maps: Sequence[Map], columns: int, colours: str, title: str, *, signed: bool = False) -> Figure:
    """Return the maps row by row, each on a colour scale of its own, from 0 or the negative limit."""
    figure, axes = grid(-(-len(maps) // columns), columns)
    figure.suptitle(title, fontsize=9)
    for ax, one in zip(axes, maps, strict=False):
        low = -one.limit if signed else 0
        ax.imshow(one.values, cmap=colours, vmin=low, vmax=one.limit, aspect="auto", interpolation="nearest")
        put_title(ax, one.title)
    return figure
