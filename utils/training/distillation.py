"""Knowledge distillation: a network learns from the scores of one that is trained already."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode


class Teacher:
    """A trained network, in evaluation mode, and its part of the loss.

    Soft: the KL divergence of the two networks' distributions at a temperature T, times T^2 (Hinton et al., arXiv
    1503.02531). Hard: the cross-entropy with the class that the teacher chooses (DeiT, arXiv 2012.12877, sec. 4).

    Args:
        model: the network, on the device; its parameters are frozen.
        config: ``TRAIN.DISTILL`` is read.
        digest: identifies its weights.
        ours, theirs: preprocessing of this run's images and of the teacher's: ``mean`` and ``std`` per channel, and of
            the teacher's also ``img_size``, None if it takes images of any size.
    """

    def __init__(
        self, model: nn.Module, config: CfgNode, *, digest: str, ours: dict[str, Any], theirs: dict[str, Any]
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.digest = digest
        self._options = config.TRAIN.DISTILL
        size = theirs["img_size"]
        self._size = (size, size) if isinstance(size, int) else size and tuple(size)
        device = next(model.parameters()).device
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1)
            for values in (theirs["mean"], theirs["std"], ours["mean"], ours["std"])
        )
        self._renormalises = any(list(ours[name]) != list(theirs[name]) for name in ("mean", "std"))
        self._scale, self._shift = own_std / std, (own_mean - mean) / std

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Return the teacher's scores (B, classes) of normalised images (B, C, H, W), resized where it needs that."""
        if self._size not in (None, tuple(images.shape[2:])):
            images = F.interpolate(images, size=self._size, mode="bicubic", antialias=True)
        if self._renormalises:
            images = images * self._scale + self._shift
        return self.model(images)

    def share(self, loss: Tensor, scores: Tensor, images: Tensor) -> Tensor:
        """Return the loss of which the teacher has its share, ``TRAIN.DISTILL.WEIGHT``, and the labels the rest.

        Args:
            loss: the loss by the labels.
            scores: of the network that learns, (B, classes).
            images: what it saw, (B, C, H, W).
        """
        theirs, temperature, weight = self.scores(images), self._options.TEMPERATURE, self._options.WEIGHT
        if self._options.KIND == "hard":
            taught = F.cross_entropy(scores, theirs.argmax(dim=1))
        else:
            ours, theirs = (F.log_softmax(x / temperature, dim=1) for x in (scores, theirs))
            taught = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
        return (1 - weight) * loss + weight * taught
