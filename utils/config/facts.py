"""Facts of the configuration that other packages need too; each is written here and nowhere else."""

from yacs.config import CfgNode

FOLDER_DATASETS = ("imagenet", "imagenet-1k", "101_ObjectCategories", "caltech101", "folder")
CIFAR_DATASETS = ("CIFAR10", "CIFAR100")
DATASETS = (*FOLDER_DATASETS, *CIFAR_DATASETS, "digits")


def mixes(config: CfgNode) -> bool:
    """Return whether mixup or cutmix is on."""
    aug = config.AUG
    return aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None


def odd_batch_problem(config: CfgNode) -> str:
    """Return what is wrong with the batch size of a run that trains with mixup or cutmix, or an empty text."""
    if config.EVAL_MODE or config.THROUGHPUT_MODE or not mixes(config) or config.DATA.BATCH_SIZE % 2 == 0:
        return ""
    return (
        f"DATA.BATCH_SIZE is {config.DATA.BATCH_SIZE}, but mixup and cutmix pair the images of a batch: take an even "
        "size, or set AUG.MIXUP and AUG.CUTMIX to 0 and AUG.CUTMIX_MINMAX to None"
    )


SMALL = 32  # pixels; up to this size, training pads and crops instead of zooming in, as published for CIFAR
CROP_RATIO = 256 / 224  # shorter side before the centre crop, relative to the crop


def short_side(size: int, *, crop: bool) -> int | None:
    """Return the shorter side (pixels) of an image before the centre crop; None: both sides become ``size``, no crop.

    Args:
        size: DATA.IMG_SIZE.
        crop: TEST.CROP, without effect on small images.
    """
    return size if size <= SMALL else int(CROP_RATIO * size) if crop else None
