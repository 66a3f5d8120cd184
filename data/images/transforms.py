"""Picture -> model input size, as the published recipe does it: timm's training transform, Resize + CenterCrop else.

Two pipelines give the same pixels. ``reference`` is the published one: PIL images, then a normalised float tensor with
random erasing. ``fast`` stops at uint8; normalisation and erasing happen on the device (``data.images.batch``). It
cuts the crop out of the decoded array before anything is copied, and draws the same random numbers in the same order.
"""

from collections.abc import Callable

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode, str_to_pil_interp
from torch import Tensor, nn
from torchvision import transforms
from yacs.config import CfgNode

from data.images.decode import Picture
from utils.errors import ImageReadError

Transform = Callable[[Picture], np.ndarray | Tensor]

SMALL = 32  # pixels; up to this size images are padded and cropped instead of zoomed into, as published for CIFAR
_CROP_PADDING = 4  # pixels
_CROP_RATIO = 256 / 224  # shorter side before the centre crop, relative to the crop
_PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13


def build_transform(config: CfgNode, *, is_train: bool) -> Transform:
    """Return the transform of the configuration.

    It maps an RGB picture (PIL image or uint8 array (H, W, 3)) to a uint8 array (S, S, 3) in the fast pipeline, to a
    normalised float tensor (3, S, S) in the reference pipeline, with S = DATA.IMG_SIZE.
    """
    data = config.DATA
    resize = torch_resize if data.FAST_RESIZE else pil_resize
    if is_train:
        return _fast_train(config, resize) if data.PIPELINE == "fast" else _reference_train(config)
    if data.PIPELINE == "fast":
        return EvalResize(data.IMG_SIZE, crop=config.TEST.CROP, interpolation=data.INTERPOLATION, resize=resize)
    return _reference_eval(data.IMG_SIZE, crop=config.TEST.CROP, interpolation=data.INTERPOLATION)


def _reference_train(config: CfgNode) -> Transform:
    built = _timm_train(config, use_prefetcher=False)
    if config.DATA.IMG_SIZE <= SMALL:
        built.transforms[:1] = _small_crop(config)
    return built


def _fast_train(config: CfgNode, resize: "Resize") -> Transform:
    stages = _timm_train(config, use_prefetcher=True).transforms[:-1]  # without the conversion to a tensor
    if config.DATA.IMG_SIZE <= SMALL:
        stages[:1] = _small_crop(config)
    else:
        stages[:1] = [ResizedCrop(stages[0], resize=resize), as_image]
    return transforms.Compose([*stages, np.asarray])


def _timm_train(config: CfgNode, *, use_prefetcher: bool) -> transforms.Compose:
    aug = config.AUG
    built = create_transform(
        input_size=config.DATA.IMG_SIZE,
        is_training=True,
        use_prefetcher=use_prefetcher,
        scale=tuple(aug.SCALE),
        ratio=tuple(aug.RATIO),
        hflip=aug.HFLIP,
        color_jitter=aug.COLOR_JITTER if aug.COLOR_JITTER > 0 else None,
        auto_augment=aug.AUTO_AUGMENT if aug.AUTO_AUGMENT not in ("none", "") else None,
        interpolation=config.DATA.INTERPOLATION,
        re_prob=aug.REPROB,
        re_mode=aug.REMODE,
        re_count=aug.RECOUNT,
    )
    allow_zero_bits(built)
    return built


def _small_crop(config: CfgNode) -> list[Callable]:
    """Random crop of the padded image; images of another size are brought to it first."""
    size = config.DATA.IMG_SIZE
    fit = EvalResize(size, crop=True, interpolation=config.DATA.INTERPOLATION, resize=pil_resize)
    return [fit, as_image, transforms.RandomCrop(size, padding=_CROP_PADDING)]


def _reference_eval(size: int, *, crop: bool, interpolation: str) -> Transform:
    mode = str_to_interp_mode(interpolation)
    if size <= SMALL:
        stages = [transforms.Resize(size, mode), transforms.CenterCrop(size)]  # nothing happens to images of the size
    elif crop:
        stages = [transforms.Resize(int(_CROP_RATIO * size), mode), transforms.CenterCrop(size)]
    else:
        stages = [transforms.Resize((size, size), mode)]
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*stages, transforms.ToTensor(), normalize])


# --- parts of the fast pipeline ---------------------------------------------------------------------------------------

Resize = Callable[[Picture, tuple[int, int], str], Picture]


def picture_size(picture: Picture) -> tuple[int, int]:
    """Return (height, width)."""
    return picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)


def as_image(picture: Picture) -> Image.Image:
    """Return a picture as a PIL image."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def cut(picture: Picture, top: int, left: int, height: int, width: int) -> Picture:
    """Return a box of a picture; a view where the picture is an array."""
    if isinstance(picture, np.ndarray):
        return picture[top : top + height, left : left + width]
    return picture.crop((left, top, left + width, top + height))


def pil_resize(picture: Picture, size: tuple[int, int], interpolation: str) -> Image.Image:
    """Resize to ``size`` = (height, width) with Pillow's antialiasing filters."""
    return as_image(picture).resize(size[::-1], str_to_pil_interp(interpolation))


def torch_resize(picture: Picture, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize with torch's antialiased uint8 kernel: several times as fast as Pillow, nearly the same pixels.

    The passes over rows and columns come in Pillow's order. What is left is rounding: on 200 ImageNet photographs,
    0.3 % of the values differ from Pillow's, by 2/255 at most, by 0.003/255 on average.
    """
    pixels = np.asarray(picture)
    pixels = pixels if pixels.flags.writeable else pixels.copy()  # torch takes no read-only memory
    # (H, W, 3) -> (1, 3, H, W); the batch's stride is right too, or torch would not answer in channels_last order
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    if _rows_first(pixels.shape[:2], size):
        image = _interpolate(image, (size[0], image.shape[3]), interpolation)
    return _interpolate(image, size, interpolation)[0].permute(1, 2, 0).numpy()  # (1, 3, H, W) -> (H, W, 3)


def _interpolate(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    return nn.functional.interpolate(image, size=size, mode=interpolation, antialias=True)


def _rows_first(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether Pillow brings the height to its target before the width, both sizes being (height, width).

    Pillow 13 does where the height loses more than twice what the width does; earlier versions and torch never do.
    """
    lost_rows, lost_columns = size[0] - target[0], size[1] - target[1]
    return _PILLOW_13 and lost_rows > max(0, 2 * lost_columns)


class ResizedCrop:
    """timm's random resized crop for pictures that may be arrays: the same random numbers, the same pixels."""

    def __init__(self, crop: RandomResizedCropAndInterpolation, *, resize: Resize) -> None:
        self._crop = crop
        self._resize = resize
        self._interpolation = crop.interpolation.value

    def __call__(self, picture: Picture) -> Picture:
        height, width = picture_size(picture)
        shape_only = torch.empty((0, height, width))  # get_params reads nothing but the size
        box = self._crop.get_params(shape_only, self._crop.scale, self._crop.ratio)
        return self._resize(cut(picture, *box), self._crop.size, self._interpolation)


class EvalResize:
    """Resize and centre crop of evaluation, as torchvision's Resize and CenterCrop; returns uint8 (S, S, 3).

    Args:
        size: S, pixels.
        crop: scale the shorter side to 256/224 of S (to S itself for S <= 32) and crop the centre, else squash.
        interpolation: name of the filter.
        resize: implementation.
    """

    def __init__(self, size: int, *, crop: bool, interpolation: str, resize: Resize) -> None:
        self.size = size
        self.short_side = size if size <= SMALL else int(_CROP_RATIO * size) if crop else None
        self.interpolation = interpolation
        self.resize = resize

    def __call__(self, picture: Picture) -> np.ndarray:
        target = self._scaled_size(*picture_size(picture))
        if picture_size(picture) != target:
            picture = self.resize(picture, target, self.interpolation)
        top, left = (int(round((length - self.size) / 2.0)) for length in target)  # torchvision's rounding
        return np.ascontiguousarray(cut(picture, top, left, self.size, self.size))

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        if self.short_side is None:
            return self.size, self.size
        scaled = tuple(int(self.short_side * side / min(height, width)) for side in (height, width))
        if Image.MAX_IMAGE_PIXELS is not None and scaled[0] * scaled[1] > Image.MAX_IMAGE_PIXELS:
            raise ImageReadError(f"{width} x {height} pixels: too elongated, resizing it would take {scaled} pixels")
        return scaled


# --- Pillow 13 and timm's Posterize -----------------------------------------------------------------------------------


def allow_zero_bits(transform: transforms.Compose) -> None:
    """Let timm's Posterize operations keep 0 bits, in this transform only.

    The published RandAugment asks for 0 bits when its random magnitude reaches 10 (about one image in 700). Pillow up
    to 12 answered with a black image, Pillow 13 raises ValueError. The old answer is part of the recipe.
    """
    for operation in _augment_ops(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """Keep the highest ``bits_to_keep`` bits of each value; 0 bits give a black image."""
    if bits_to_keep >= 8:
        return image
    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return ImageOps.posterize(image, bits_to_keep)


def _augment_ops(transform: object) -> list[AugmentOp]:
    """Return timm's elementary operations inside a transform; the augmentation policies nest them in lists."""
    if isinstance(transform, AugmentOp):
        return [transform]
    if isinstance(transform, list | tuple):
        parts = transform
    else:
        parts = [getattr(transform, name, ()) for name in ("transforms", "ops", "policy")]
    return [operation for part in parts for operation in _augment_ops(part)]
