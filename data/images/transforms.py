"""Build the transforms of the published recipe: timm's in training, Resize and CenterCrop in evaluation.

Two pipelines give the same pixels. ``reference`` is the published one: PIL images, then a normalised float tensor with
random erasing. ``fast`` stops at uint8 (normalisation and erasing happen on the device, in ``data.images.batch``), cuts
the crop out of the decoded array, and draws the same random numbers in the same order.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms
from yacs.config import CfgNode

from data.images.decode import Picture
from data.images.posterize import allow_zero_bits
from data.images.resize import EvalResize, Resize, ResizedCrop, as_image, pil_resize, torch_resize
from utils.config import CROP_RATIO, SMALL
from utils.runtime import seeded_streams

Transform = Callable[[Picture], np.ndarray | Tensor]

_CROP_PADDING = 4  # pixels


def build_transform(config: CfgNode, *, is_train: bool) -> Transform:
    """Return the transform of the configuration.

    It maps an RGB picture (PIL image or uint8 array (H, W, 3)) to a uint8 array (S, S, 3) in the fast pipeline, to a
    normalised float tensor (3, S, S) in the reference pipeline, with S = DATA.IMG_SIZE.
    """
    data = config.DATA
    if data.PIPELINE == "reference":
        return _reference_train(config) if is_train else _reference_eval(config)
    resize = torch_resize if data.FAST_RESIZE else pil_resize
    if is_train:
        return _fast_train(config, resize)
    return EvalResize(data.IMG_SIZE, crop=config.TEST.CROP, interpolation=data.INTERPOLATION, resize=resize)


def check_transform(config: CfgNode) -> None:
    """Build the transforms once and run each on one small image; the random streams stay as they are.

    Raises:
        ValueError: a transform cannot be built or run, or the model does not take the colour images that it makes.
    """
    if config.MODEL.STRIP_MLP.IN_CHANS != 3:
        raise ValueError(
            f"MODEL.STRIP_MLP.IN_CHANS is {config.MODEL.STRIP_MLP.IN_CHANS}, but every image is read as RGB; "
            "set it to 3"
        )
    picture = Image.fromarray(np.zeros((40, 48, 3), np.uint8))
    with seeded_streams(0):
        for is_train in (True, False):
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
    if config.DATA.IMG_SIZE <= SMALL:
        built.transforms[:1] = _small_crop(config)
    return built


def _fast_train(config: CfgNode, resize: Resize) -> Transform:
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
    """Return the stages of a random crop of the padded image; images of another size are resized first."""
    size = config.DATA.IMG_SIZE
    fit = EvalResize(size, crop=True, interpolation=config.DATA.INTERPOLATION, resize=pil_resize)
    return [fit, as_image, transforms.RandomCrop(size, padding=_CROP_PADDING)]


def _reference_eval(config: CfgNode) -> Transform:
    size, mode = config.DATA.IMG_SIZE, str_to_interp_mode(config.DATA.INTERPOLATION)
    if size <= SMALL:
        stages = [transforms.Resize(size, mode), transforms.CenterCrop(size)]  # no effect on images of this size
    elif config.TEST.CROP:
        stages = [transforms.Resize(int(CROP_RATIO * size), mode), transforms.CenterCrop(size)]
    else:
        stages = [transforms.Resize((size, size), mode)]
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*stages, transforms.ToTensor(), normalize])
