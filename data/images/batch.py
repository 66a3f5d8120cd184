"""What happens to a whole batch on the device: normalisation, random erasing, mixup and cutmix, in this order."""

import math
from collections.abc import Sequence

import torch
from timm.data import Mixup
from torch import Tensor
from yacs.config import CfgNode

from data.images.erasing import RandomErasing
from utils.config import mixes, normalisation
from utils.runtime import seeded_streams


class BatchTransform:
    """Make a loader's batch ready for the model.

    uint8 images are normalised with DATA.MEAN and DATA.STD and, in training, randomly erased; float images come from
    the reference pipeline, which has done both. Then, in training, timm's Mixup mixes images and labels; at the end of
    the run it may only smooth the labels. The global random streams are left alone.

    Args:
        device: where the batch goes.
        mean, std: of each channel, for pixels from 0 to 1.
        erasing: random erasing, or None.
        mixup: timm's Mixup, or None.
        seed, rank: seed of the run and rank of this process, for mixup.
        mixed_epochs: epochs before images are mixed no more.

    Attributes:
        mixes: whether targets come out as class distributions (B, num_classes) instead of labels (B,).
    """

    def __init__(
        self,
        device: torch.device,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        erasing: RandomErasing | None,
        mixup: Mixup | None,
        seed: int,
        rank: int,
        mixed_epochs: float = math.inf,
    ) -> None:
        self.device = device
        self.mixes = mixup is not None
        self._erasing = erasing
        self._mixup = mixup
        self._seed = seed
        self._rank = rank
        self._mixed_epochs = mixed_epochs
        self._mean, self._std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))

    def __call__(
        self, images: Tensor, targets: Tensor, indices: Tensor, *, epoch: int = 0, update: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return (float images, targets) on the device.

        Args:
            images: (B, C, H, W), uint8 in 0..255 or normalised float; B is even under mixup.
            targets: int64 (B,).
            indices: int64 (B,) on the CPU, indices of the samples in their data set.
            epoch: seeds the erasing, together with each index, and says whether to mix.
            update: number of the optimizer update; seeds the mixing, together with rank, epoch and the first index
                (so that the batches of one accumulated update are mixed differently).
        """
        raw = images.dtype == torch.uint8
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if raw:
            # the order of ToTensor and Normalize, so that the values are theirs to the last bit
            images = images.float().div_(255).sub_(self._mean).div_(self._std)
            if self._erasing is not None:
                images = self._erasing(images, indices, epoch=epoch)
        if self._mixup is None:
            return images, targets
        self._mixup.mixup_enabled = epoch < self._mixed_epochs
        with seeded_streams(self._seed, self._rank, epoch, update, int(indices[0])):
            return self._mixup(images, targets)


def build_batch_transform(
    config: CfgNode,
    *,
    is_train: bool,
    device: torch.device | str,
    rank: int = 0,
    num_classes: int = 0,
    epochs: float = 0,
) -> BatchTransform:
    """Return the batch transform of the configuration; in evaluation it only moves and normalises.

    ``num_classes``: length of mixed targets; 0 takes MODEL.NUM_CLASSES. ``epochs``: length of the run, to which
    AUG.MIXUP_OFF_EPOCHS is scaled; 0 takes TRAIN.EPOCHS.
    """
    aug = config.AUG
    erasing = mixup = None
    if is_train and aug.REPROB > 0:
        erasing = RandomErasing(aug.REPROB, mode=aug.REMODE, max_count=aug.RECOUNT, seed=config.SEED)
    if is_train and mixes(config):
        mixup = Mixup(
            mixup_alpha=aug.MIXUP,
            cutmix_alpha=aug.CUTMIX,
            cutmix_minmax=aug.CUTMIX_MINMAX,
            prob=aug.MIXUP_PROB,
            switch_prob=aug.MIXUP_SWITCH_PROB,
            mode=aug.MIXUP_MODE,
            label_smoothing=config.MODEL.LABEL_SMOOTHING,
            num_classes=num_classes or config.MODEL.NUM_CLASSES,
        )
    mean, std = normalisation(config)
    epochs = epochs or config.TRAIN.EPOCHS
    return BatchTransform(
        torch.device(device),
        mean=mean,
        std=std,
        erasing=erasing,
        mixup=mixup,
        seed=config.SEED,
        rank=rank,
        mixed_epochs=epochs - epochs * aug.MIXUP_OFF_EPOCHS / config.TRAIN.EPOCHS,
    )
