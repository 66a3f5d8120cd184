"""The batch that the network sees, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.config import IMAGENET_MEAN, IMAGENET_STD
from utils.runtime import printable

SHOWN = 32  # images
_COLUMNS, _CELL, _GAP, _LINE = 8, 128, 8, 15  # images in a row, then pixels


def shown_channels(pixels: np.ndarray) -> np.ndarray:
    """Return the red, green and blue (H, W, 3) by which to show an image of any channels, (H, W) or (H, W, C).

    One or two channels, of which the second may be alpha, are shown in grey; of four and more, the first three are.
    """
    pixels = np.atleast_3d(pixels)
    return np.repeat(pixels[:, :, :1], 3, axis=2) if pixels.shape[2] < 3 else pixels[:, :, :3]


def draw_batch(
    images: Tensor,
    targets: Tensor,
    classes: Sequence[str],
    *,
    smoothing: float = 0.0,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Image.Image:
    """Return a sheet of the first ``SHOWN`` images with their class names, and their shares where classes are mixed.

    Args:
        images: (B, C, H, W), normalised.
        targets: int64 labels (B,), or class distributions (B, num_classes).
        classes: class names.
        smoothing: label smoothing that the distributions contain; the shares are shown without it.
        mean, std: of each channel, by which the images are normalised.
    """
    import matplotlib  # for its font, which has the letters of most languages

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 11)
    pixels, labels = _pixels(images[:SHOWN], mean, std), _labels(targets[:SHOWN].cpu(), classes, smoothing)
    rows, columns = -(-len(pixels) // _COLUMNS), min(_COLUMNS, len(pixels))
    height = _CELL + _GAP + _LINE * max(map(len, labels))
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, lines) in enumerate(zip(pixels, labels, strict=True)):
        left, top = _GAP + number % _COLUMNS * (_CELL + _GAP), _GAP + number // _COLUMNS * height
        enlarged = picture.width <= _CELL
        sheet.paste(
            picture.resize((_CELL, _CELL), Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX), (left, top)
        )
        for place, (name, share) in enumerate(lines):
            draw.text((left, top + _CELL + 1 + place * _LINE), _fitted(name, share, font), "black", font)
    return sheet


def _pixels(images: Tensor, *normalisation: Sequence[float]) -> list[Image.Image]:
    """Return normalised images as pictures."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation)
    bytes_ = (images.detach().float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(shown_channels(picture.permute(1, 2, 0).numpy()).copy()) for picture in bytes_]


def _labels(targets: Tensor, classes: Sequence[str], smoothing: float) -> list[list[tuple[str, str]]]:
    """Return each image's (name, share) pairs, largest share first; the share is empty where a class is alone."""
    if targets.ndim == 1:
        return [[(printable(classes[label]), "")] for label in targets.tolist()]
    shares = (targets - smoothing / targets.shape[1]) / (1 - smoothing)
    labels = []
    for row in shares:
        found = [(row[label].item(), classes[label]) for label in (row > 0.005).nonzero().flatten().tolist()]
        found.sort(key=lambda pair: -pair[0])
        labels.append([(printable(name), f" {share:.0%}" if share < 0.995 else "") for share, name in found])
    return labels


def _fitted(name: str, share: str, font: ImageFont.FreeTypeFont) -> str:
    """Return name and share, the name cut where both would be wider than the image."""
    name, cut = name[:100], ""
    while name and font.getlength(name + cut + share) > _CELL:
        name, cut = name[:-1], "\N{HORIZONTAL ELLIPSIS}"
    return name + cut + share
