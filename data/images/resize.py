"""Crop, mirror and resize pictures that may be arrays: the pixels of timm and torchvision with fewer copies.

A crop is cut out of the decoded array before anything is copied. ``pil_resize`` gives the published pixels;
``torch_resize`` is several times as fast and differs by rounding.
"""

import math
from collections.abc import Callable

import numpy as np
import PIL
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor, nn

from data.images.decode import Picture, ScalableJpeg
from utils.config import CROP_RATIO, as_pair, short_side
from utils.errors import ImageReadError

Resize = Callable[[Picture, tuple[int, int], str], Picture]  # picture, (height, width), name of the filter

_PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13


class ResizedCrop:
    """Random resized crop of timm for pictures that may be arrays: the same random numbers, the same pixels."""

    def __init__(self, crop: RandomResizedCropAndInterpolation, *, resize: Resize) -> None:
        self._crop = crop
        self._resize = resize
        self._interpolation = crop.interpolation.value

    def __call__(self, picture: Picture | ScalableJpeg) -> Picture:
        height, width = _size(picture)
        shape_only = torch.empty((0, height, width))  # get_params reads nothing but the size
        box = self._crop.get_params(shape_only, self._crop.scale, self._crop.ratio)
        return _resize_part(picture, box, self._crop.size, self._interpolation, self._resize)


class PaddedCrop:
    """Random crop of an array with a black border: the random numbers and the pixels of torchvision's RandomCrop.

    Args:
        size: (H, W) in pixels, of the array and of the crop.
        padding: width of the border in pixels.
    """

    def __init__(self, size: tuple[int, int], *, padding: int) -> None:
        self._size = size
        self._padding = padding

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        (height, width), padding = self._size, self._padding
        padded = np.zeros((height + 2 * padding, width + 2 * padding, pixels.shape[2]), np.uint8)
        padded[padding : padding + height, padding : padding + width] = pixels
        top, left = torch.randint(2 * padding + 1, (2,)).tolist()
        return _cut(padded, top, left, height, width)


class RandomMirror:
    """torchvision's RandomHorizontalFlip for pictures that may be arrays: the same random numbers."""

    def __init__(self, probability: float) -> None:
        self._probability = probability

    def __call__(self, picture: Picture) -> Picture:
        if torch.rand(1) >= self._probability:
            return picture
        if isinstance(picture, Image.Image):
            return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _as_tensor(picture).flip(1).numpy()  # torch mirrors interleaved channels ten times as fast as numpy


class EvalResize:
    """Resize and centre crop of evaluation, as torchvision's Resize and CenterCrop; returns uint8 (H, W, C).

    Args:
        size: (H, W) in pixels, or one number for a square.
        crop: scale the picture so that it just covers size / ratio (the size itself up to 32 pixels) and crop the
            centre; otherwise squash the whole picture into the size.
        ratio: TEST.CROP_RATIO.
        interpolation: name of the filter.
        resize: implementation.

    Raises:
        ImageReadError: when called with a picture so elongated that its resized form would not fit into memory.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        crop: bool,
        ratio: float = CROP_RATIO,
        interpolation: str,
        resize: Resize,
    ) -> None:
        self.size = size
        self.short_side = short_side(size, crop=crop, ratio=ratio)
        self.interpolation = interpolation
        self.resize = resize

    def __call__(self, picture: Picture | ScalableJpeg) -> np.ndarray:
        target = self._scaled_size(*_size(picture))
        picture = _resize_part(picture, (0, 0, *_size(picture)), target, self.interpolation, self.resize)
        size = as_pair(self.size)
        top, left = (int(round((a - b) / 2.0)) for a, b in zip(target, size, strict=True))  # torchvision's rounding
        return np.ascontiguousarray(as_pixels(_cut(picture, top, left, *size)))

    def metadata(self) -> dict[str, object]:
        """Return what the pixels depend on besides the picture, for the name of a file that keeps them."""
        library = f"Pillow {PIL.__version__}"
        if self.resize is torch_resize:
            library = f"torch {torch.__version__} in the order of {library}, large JPEG files decoded small"
        return {
            "size": self.size,
            "short_side": self.short_side,
            "interpolation": self.interpolation,
            "library": library,
        }

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        if self.short_side is None:
            return as_pair(self.size)
        rows, columns = as_pair(self.short_side)
        new, old = (rows, height) if rows * width >= columns * height else (columns, width)
        scaled = tuple(int(new * side / old) for side in (height, width))
        if Image.MAX_IMAGE_PIXELS is not None and scaled[0] * scaled[1] > Image.MAX_IMAGE_PIXELS:
            raise ImageReadError(f"{width} x {height} pixels: too elongated, resizing it would take {scaled} pixels")
        return scaled


def _resize_part(
    picture: Picture | ScalableJpeg,
    box: tuple[int, int, int, int],
    target: tuple[int, int],
    interpolation: str,
    resize: Resize,
) -> Picture:
    """Resize the box (top, left, height, width) of a picture to ``target`` = (height, width).

    A JPEG file that is not decoded yet is decoded as small as leaves the box at least twice as large as ``target``.
    Where the box then begins or ends between two pixels, Pillow's resize takes that into account. The pixels differ
    from those of the whole picture by 0.3/255 to 0.5/255 on average (docs/PERFORMANCE.md).
    """
    top, left, height, width = box
    if isinstance(picture, ScalableJpeg):
        reductions = (r for r in ScalableJpeg.REDUCTIONS if height >= 2 * r * target[0] and width >= 2 * r * target[1])
        reduction = next(reductions, 1)
        picture = picture.decode(reduction)
        edges = [edge / reduction for edge in (left, top, left + width, top + height)]
        left, top = int(edges[0]), int(edges[1])
        height, width = math.ceil(edges[3]) - top, math.ceil(edges[2]) - left
        if not all(edge.is_integer() for edge in edges):
            part = as_image(_cut(picture, top, left, height, width))  # what lies outside has no influence
            edges = [edge - start for edge, start in zip(edges, (left, top) * 2, strict=True)]
            return part.resize(target[::-1], str_to_pil_interp(interpolation), box=edges)
    part = _cut(picture, top, left, height, width)
    return part if _size(part) == target else resize(part, target, interpolation)


def as_image(picture: Picture) -> Image.Image:
    """Return an RGB or grey picture as a PIL image."""
    if isinstance(picture, Image.Image):
        return picture
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def as_pixels(picture: Picture) -> np.ndarray:
    """Return a picture as a uint8 array (H, W, C)."""
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def pil_resize(picture: Picture, size: tuple[int, int], interpolation: str) -> Picture:
    """Resize to ``size`` = (height, width) with Pillow's antialiasing filters, the bands of an array one by one."""
    if isinstance(picture, np.ndarray) and picture.shape[2] not in (1, 3):
        bands = np.split(picture, picture.shape[2], axis=2)
        return np.stack([np.asarray(pil_resize(band, size, interpolation)) for band in bands], axis=2)
    return as_image(picture).resize(size[::-1], str_to_pil_interp(interpolation))


def torch_resize(picture: Picture, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize to ``size`` = (height, width) with PyTorch's antialiasing uint8 kernel.

    The passes over rows and columns come in Pillow's order. What is left is rounding: on 200 ImageNet photographs,
    0.3 % of the values differ from Pillow's, by 2/255 at most, by 0.003/255 on average.
    """
    pixels = as_pixels(picture)
    # (H, W, C) -> (1, C, H, W); the batch's stride is right too, or torch would not answer in channels_last order
    image = _as_tensor(pixels)[None].permute(0, 3, 1, 2)
    if _rows_first(pixels.shape[:2], size):
        image = _interpolate(image, (size[0], image.shape[3]), interpolation)
    return _interpolate(image, size, interpolation)[0].permute(1, 2, 0).numpy()  # (1, C, H, W) -> (H, W, C)


def _as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())  # torch takes no read-only memory


def _interpolate(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    return nn.functional.interpolate(image, size=size, mode=interpolation, antialias=True)


def _rows_first(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Return whether Pillow scales the height before the width, both sizes being (height, width).

    Pillow 13 does so where the height loses more than twice as many pixels as the width; earlier versions and PyTorch
    never do.
    """
    lost_rows, lost_columns = size[0] - target[0], size[1] - target[1]
    return _PILLOW_13 and lost_rows > max(0, 2 * lost_columns)


def _size(picture: Picture | ScalableJpeg) -> tuple[int, int]:
    """Return (height, width)."""
    return picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)


def _cut(picture: Picture, top: int, left: int, height: int, width: int) -> Picture:
    """Return a box of a picture; a view where the picture is an array."""
    if isinstance(picture, np.ndarray):
        return picture[top : top + height, left : left + width]
    return picture.crop((left, top, left + width, top + height))
