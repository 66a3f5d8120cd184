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
