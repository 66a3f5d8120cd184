"""Training loss of the published recipe."""

from timm.loss import SoftTargetCrossEntropy
from torch import nn
from yacs.config import CfgNode


def build_criterion(config: CfgNode, *, soft_targets: bool) -> nn.Module:
    """Return soft-target cross-entropy under mixup or cutmix, else cross-entropy with label smoothing.

    Args:
        config: ``MODEL.LABEL_SMOOTHING`` is read; under mixing the targets are smoothed already.
        soft_targets: whether the batch transform mixes, as its ``mixes`` attribute says.
    """
    if soft_targets:
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=config.MODEL.LABEL_SMOOTHING)
