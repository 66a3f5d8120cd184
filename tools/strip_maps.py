"""What strip mixing has learned, as maps: the strip weights and the tables of relative positions."""

from matplotlib.figure import Figure

from models import StripMLPNet
from tools.figures import grid, put_title


def draw_strips(model: StripMLPNet) -> Figure:
    """Return the strip weights of each stage's last block: mean magnitude over the channels, output by input token."""
    figure, axes = grid(len(model.stages), 6)
    places = iter(axes)
    for number, stage in enumerate(model.stages, start=1):
        cgsmm = stage[-1].strip_mixing.cgsmm
        for line, layer in (("row", cgsmm.row_mix), ("column", cgsmm.column_mix)):
            weight = layer.mix.weight.detach().cpu().squeeze(2)  # (G * W', W, 1, 3) -> (G * W', W, 3)
            maps = weight.unflatten(0, (layer.mix.groups, -1)).abs().mean(dim=0)  # -> (G, W', W, 3) -> (W', W, 3)
            for which, part in zip((f"{line} before", f"own {line}", f"{line} after"), maps.unbind(2), strict=True):
                ax = next(places)
                ax.imshow(part.numpy(), cmap="viridis", vmin=0, vmax=maps.max().item())
                put_title(ax, f"stage {number}, {which}")
    return figure


def draw_positions(model: StripMLPNet) -> Figure:
    """Return the relative position tables of each stage's last block: offset by channel."""
    figure, axes = grid(len(model.stages), 2)
    places = iter(axes)
    for number, stage in enumerate(model.stages, start=1):
        cgsmm = stage[-1].strip_mixing.cgsmm
        for lines, position in (("rows", cgsmm.row_position), ("columns", cgsmm.column_position)):
            table, ax = position.table.detach().cpu(), next(places)
            limit = table.abs().max().item()
            ax.imshow(table.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
            put_title(ax, f"stage {number}, {lines}: offset x channel")
    return figure
