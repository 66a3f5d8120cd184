"""Facts of the configuration that other packages need too; each is written here and nowhere else."""

from yacs.config import CfgNode

FOLDER_DATASETS = ("imagenet", "imagenet-1k", "101_ObjectCategories", "caltech101", "folder")
CIFAR_DATASETS = ("CIFAR10", "CIFAR100")
FILE_DATASETS = (*FOLDER_DATASETS, "csv")
DATASETS = (*FILE_DATASETS, "shards", *CIFAR_DATASETS, "digits", "timm:NAME")


def mixes(config: CfgNode) -> bool:
    """Return whether mixup or cutmix is on."""
    aug = config.AUG
    return aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None


def odd_batch_problem(config: CfgNode) -> str:
    """Return what is wrong with the batch size of a run that trains with mixup or cutmix, or an empty text."""
    if not (trains(config) and mixes(config)) or config.DATA.BATCH_SIZE % 2 == 0:
        return ""
    return (
        f"DATA.BATCH_SIZE is {config.DATA.BATCH_SIZE}, but mixup and cutmix pair the images of a batch: take an even "
        "size, or set AUG.MIXUP and AUG.CUTMIX to 0 and AUG.CUTMIX_MINMAX to None"
    )


SMALL = 32  # pixels; up to this size, training pads and crops instead of zooming in, as published for CIFAR
CROP_RATIO = 224 / 256  # the published TEST.CROP_RATIO


def short_side(size: int | tuple[int, int], *, crop: bool, ratio: float = CROP_RATIO) -> int | tuple[int, int] | None:
    """Return the shorter side (pixels) of an image before the centre crop; None: scaled to ``size`` itself, no crop.

    For a rectangular crop it is the (height, width) that the image has to cover.

    Args:
        size: DATA.IMG_SIZE.
        crop: TEST.CROP, without effect on small images.
        ratio: TEST.CROP_RATIO, likewise; the default gives the published int(256 / 224 * size) at every size.
    """
    if max(as_pair(size)) <= SMALL:
        return size
    if not crop:
        return None
    return int(size / ratio) if isinstance(size, int) else tuple(int(side / ratio) for side in size)


def trains(config: CfgNode) -> bool:
    """Return whether the configuration is for training: neither for evaluation nor for measuring the throughput."""
    return not (config.EVAL_MODE or config.THROUGHPUT_MODE)


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a size, such as DATA.IMG_SIZE, as (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def input_shape(config: CfgNode) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that the model takes."""
    return config.MODEL.STRIP_MLP.IN_CHANS, *as_pair(config.DATA.IMG_SIZE)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green, blue


def channel_values(config: CfgNode) -> dict[str, tuple[float, ...]]:
    """Return DATA.MEAN and DATA.STD by name, one value for each channel or one for all.

    Images that are not RGB get the average of ImageNet's values, as in timm, unless the keys say otherwise.
    """
    rgb = config.MODEL.STRIP_MLP.IN_CHANS == len(IMAGENET_MEAN)
    defaults = {"DATA.MEAN": IMAGENET_MEAN, "DATA.STD": IMAGENET_STD}
    given = {"DATA.MEAN": tuple(config.DATA.MEAN), "DATA.STD": tuple(config.DATA.STD)}
    return {
        name: (sum(values) / len(values),) if values == defaults[name] and not rgb else values
        for name, values in given.items()
    }


def normalisation(config: CfgNode) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel."""
    channels = config.MODEL.STRIP_MLP.IN_CHANS
    mean, std = (values * channels if len(values) == 1 else values for values in channel_values(config).values())
    return mean, std
