"""Training loss: that of the published recipe, or binary cross-entropy."""

from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from yacs.config import CfgNode


def build_criterion(config: CfgNode, *, soft_targets: bool) -> nn.Module:
    """Return soft-target cross-entropy under mixup or cutmix, else cross-entropy with label smoothing.

    With ``TRAIN.LOSS.NAME bce``, return the binary cross-entropy of each class instead ("ResNet strikes back", arXiv
    2110.00476).

    Args:
        config: ``TRAIN.LOSS`` and ``MODEL.LABEL_SMOOTHING`` are read; under mixing the targets are smoothed already.
        soft_targets: whether the batch transform mixes, as its ``mixes`` attribute says.
    """
    loss = config.TRAIN.LOSS
    if loss.NAME == "bce":
        return BinaryCrossEntropy(
            config.MODEL.LABEL_SMOOTHING, target_threshold=loss.BCE_THRESHOLD or None, sum_classes=loss.BCE_SUM
        )
    if soft_targets:
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=config.MODEL.LABEL_SMOOTHING)
