"""Build the transforms of the published recipe: timm's in training, Resize and CenterCrop in evaluation.

Two pipelines give the same pixels. ``reference`` is the published one: PIL images, then a normalised float tensor with
random erasing. ``fast`` stops at uint8 (normalisation and erasing happen on the device, in ``data.images.batch``), cuts
the crop out of the decoded array, and draws the same random numbers in the same order.
"""

from collections.abc import Callable

import numpy as np
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor
from torchvision import transforms
from yacs.config import CfgNode

from data.images.decode import Picture
from data.images.posterize import allow_zero_bits
from data.images.resize import (
    EvalResize,
    PaddedCrop,
    RandomMirror,
    Resize,
    ResizedCrop,
    as_image,
    as_pixels,
    pil_resize,
    torch_resize,
)
from utils.config import SMALL, as_pair, normalisation, short_side, trains
from utils.runtime import seeded_streams

Transform = Callable[[Picture], np.ndarray | Tensor]

_CROP_PADDING = 4  # pixels


def build_transform(config: CfgNode, *, is_train: bool) -> Transform:
    """Return the transform of the configuration.

    It maps a picture of MODEL.STRIP_MLP.IN_CHANS channels (PIL image or uint8 array) to a uint8 array (H, W, C) in the
    fast pipeline, to a normalised float tensor (C, H, W) in the reference pipeline, with H and W of DATA.IMG_SIZE.
    """
    data = config.DATA
    if data.PIPELINE == "reference":
        return _reference_train(config) if is_train else _reference_eval(config)
    resize = torch_resize if data.FAST_RESIZE else pil_resize
    if is_train:
        return _fast_train(config, resize) if config.MODEL.STRIP_MLP.IN_CHANS in (1, 3) else _band_train(config, resize)
    return _eval_resize(config, resize)


def check_transform(config: CfgNode) -> None:
    """Build the transforms once and run each on one small image; the random streams stay as they are.

    For evaluation, only its own is built.

    Raises:
        ValueError: a transform cannot be built or run.
    """
    channels = config.MODEL.STRIP_MLP.IN_CHANS
    picture = np.zeros((40, 48, channels), np.uint8)
    picture = as_image(picture) if channels in (1, 3) else picture
    with seeded_streams(0):
        for is_train in (True, False) if trains(config) else (False,):
            try:
                build_transform(config, is_train=is_train)(picture)
            except Exception as error:  # whatever the libraries raise
                raise ValueError(
                    f"the {'training' if is_train else 'evaluation'} transform cannot be used with AUG.AUTO_AUGMENT "
                    f"{config.AUG.AUTO_AUGMENT or 'none'}, DATA.INTERPOLATION {config.DATA.INTERPOLATION}, "
                    f"DATA.PIPELINE {config.DATA.PIPELINE}, DATA.IMG_SIZE {config.DATA.IMG_SIZE}: "
                    f"{str(error) or type(error).__name__}"
                ) from error


def _reference_train(config: CfgNode) -> Transform:
    built = _timm_train(config, use_prefetcher=False)
    if _is_small(config):
        crop = transforms.RandomCrop(as_pair(config.DATA.IMG_SIZE), padding=_CROP_PADDING)
        built.transforms[:1] = [_eval_resize(config, pil_resize), as_image, crop]
    return built


def _fast_train(config: CfgNode, resize: Resize) -> Transform:
    crop, *stages = _timm_train(config, use_prefetcher=True).transforms[:-1]  # without the conversion to a tensor
    first = _small_crop(config, pil_resize) if _is_small(config) else [ResizedCrop(crop, resize=resize)]
    if stages and isinstance(stages[0], transforms.RandomHorizontalFlip):
        first.append(RandomMirror(stages.pop(0).p))
    return transforms.Compose([*first, *([as_image, *stages] if stages else []), _to_array])


def _band_train(config: CfgNode, resize: Resize) -> Transform:
    """Return crop and mirroring for images that are neither RGB nor grey, which Pillow cannot hold."""
    data, aug = config.DATA, config.AUG
    crop = RandomResizedCropAndInterpolation(
        as_pair(data.IMG_SIZE), scale=tuple(aug.SCALE), ratio=tuple(aug.RATIO), interpolation=data.INTERPOLATION
    )
    first = _small_crop(config, resize) if _is_small(config) else [ResizedCrop(crop, resize=resize)]
    return transforms.Compose([*first, RandomMirror(aug.HFLIP), _to_array])


def _to_array(picture: Picture) -> np.ndarray:
    return np.ascontiguousarray(as_pixels(picture))


def _is_small(config: CfgNode) -> bool:
    return max(as_pair(config.DATA.IMG_SIZE)) <= SMALL


def _timm_train(config: CfgNode, *, use_prefetcher: bool) -> transforms.Compose:
    aug = config.AUG
    mean, std = normalisation(config)
    built = create_transform(
        input_size=as_pair(config.DATA.IMG_SIZE),
        mean=mean,
        std=std,
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


def _small_crop(config: CfgNode, resize: Resize) -> list[Callable]:
    """Return the stages of a random crop of the padded image; images of another size are resized first."""
    return [_eval_resize(config, resize), PaddedCrop(as_pair(config.DATA.IMG_SIZE), padding=_CROP_PADDING)]


def _eval_resize(config: CfgNode, resize: Resize) -> EvalResize:
    """Return the resize and crop of evaluation, which also brings small training images to their size."""
    return EvalResize(
        config.DATA.IMG_SIZE,
        crop=config.TEST.CROP,
        ratio=config.TEST.CROP_RATIO,
        interpolation=config.DATA.INTERPOLATION,
        resize=resize,
    )


def _reference_eval(config: CfgNode) -> Transform:
    size, mode = config.DATA.IMG_SIZE, str_to_interp_mode(config.DATA.INTERPOLATION)
    side = short_side(size, crop=config.TEST.CROP, ratio=config.TEST.CROP_RATIO)
    stages = [transforms.Resize(side or (size, size), mode), transforms.CenterCrop(size)]
    return transforms.Compose([*stages, transforms.ToTensor(), transforms.Normalize(*normalisation(config))])
