"""Training loss: that of the published recipe, or binary cross-entropy."""

import numpy as np
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy in which classes have weights: the mean over the images of -sum_c w_c t_c log p_c.

    t is the target distribution of an image, smoothed or mixed; of a label y without smoothing, what is left is
    -w_y log p_y. The mean divides by the number of images, not by their weights as PyTorch's does: what an image
    contributes to an update does not depend on the others of its batch, nor on how the batch is divided.

    Args:
        weights: (C,), one for each class.
        label_smoothing: of labels; distributions are taken as they are.

    Shape: logits (B, C) and labels (B,) or distributions (B, C) -> a scalar.
    """

    def __init__(self, weights: Tensor, *, label_smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.0
        total = F.cross_entropy(logits, targets, self.weights, reduction="sum", label_smoothing=smoothing)
        return total / len(logits)


def class_weights(config: CfgNode, targets: np.ndarray, num_classes: int) -> Tensor | None:
    """Return the weights of ``TRAIN.CLASS_WEIGHTS``, None for ``none``.

    ``balanced`` is images / (classes * images of the class), as in scikit-learn: all classes together weigh the same,
    and the mean weight of an image is 1.

    Args:
        config: the configuration.
        targets: labels of the training set.
        num_classes: number of classes, each with at least one image.
    """
    if config.TRAIN.CLASS_WEIGHTS == "none":
        return None
    counts = np.bincount(targets, minlength=num_classes)
    return torch.tensor(len(targets) / (num_classes * counts), dtype=torch.float32)


def build_criterion(config: CfgNode, *, soft_targets: bool, weights: Tensor | None = None) -> nn.Module:
    """Return soft-target cross-entropy under mixup or cutmix, else cross-entropy with label smoothing.

    With ``TRAIN.LOSS.NAME bce``, return the binary cross-entropy of each class instead ("ResNet strikes back", arXiv
    2110.00476).

    Args:
        config: ``TRAIN.LOSS`` and ``MODEL.LABEL_SMOOTHING`` are read; under mixing the targets are smoothed already.
        soft_targets: whether the batch transform mixes, as its ``mixes`` attribute says.
        weights: of the classes (``class_weights``), for cross-entropy.
    """
    loss = config.TRAIN.LOSS
    if loss.NAME == "bce":
        return BinaryCrossEntropy(
            config.MODEL.LABEL_SMOOTHING, target_threshold=loss.BCE_THRESHOLD or None, sum_classes=loss.BCE_SUM
        )
    if weights is not None:
        return WeightedCrossEntropy(weights, label_smoothing=config.MODEL.LABEL_SMOOTHING)
    if soft_targets:
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=config.MODEL.LABEL_SMOOTHING)
