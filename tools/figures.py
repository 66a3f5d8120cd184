"""Figures that need no display: as PNG, as a grid of pictures, and the thumbnails in them."""

from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data import decode_image, read_image_file


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of ``width`` x ``height`` inches that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.1)
    return buffer.getvalue()


def grid(rows: int, columns: int, *, lines: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of pictures without ticks, and its axes row by row; titles have ``lines`` lines."""
    figure = new_figure(2.2 * columns, (2.2 + 0.15 * lines) * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    return figure, axes


def put_title(axes: Axes, title: str) -> None:
    """Set the title of a picture in a grid; a "$" in it is a dollar sign."""
    axes.set_title(title, fontsize=8, parse_math=False)


def thumbnail(path: str, side: int) -> Image.Image:
    """Return an image file at most ``side`` pixels wide and high, for display."""
    image = decode_image(read_image_file(path), as_array=False)
    image.thumbnail((side, side))
    return image
