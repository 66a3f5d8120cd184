"""Feature maps for detection, segmentation and other dense tasks.

Legend: B batch, C channels, H rows, W columns. The reduction of a map is the pixels of the image for one of its cells.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .checkpoint_compat import from_published
from .resample import fit_weights

logger = logging.getLogger(__name__)

# What may be gone from a network that was pruned to its feature maps.
_PARTS = re.compile(r"(head|norm|stages\.\d+|merging\.\d+|skip_\d_to_\d)\.")


class StripMLPFeatures(FeatureGetterNet):
    """The feature maps of a network, which ``timm.create_model(..., features_only=True)`` returns as a list.

    What the maps do not need is gone, so that every parameter gets a gradient. The network is the submodule ``model``.
    """

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, which then runs the block a second time."""
        self.model.set_grad_checkpointing(enable)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights of this module, or those of a whole network, as ``checkpoint_path`` of timm asks for.

        Of a whole network, what is gone here is left out. It may be one for images of another size or with other
        channels; what is changed in its weights is logged.
        """
        own = self.state_dict()
        if not any(name in own for name in state_dict):
            whole, changes = fit_weights(from_published(state_dict), self.model)
            for change in changes:
                logger.warning("%s", change)
            left = {name for name, part in self.model.named_modules() if not isinstance(part, nn.Identity)}
            gone = {name for name in whole if (part := _PARTS.match(name)) and part[1] not in left}
            state_dict = {f"model.{name}": value for name, value in whole.items() if name not in gone}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


class DenseBackbone(nn.Module):
    """Feature maps of images of any size from a network for images of one size, as torchvision's detectors take them.

    - ``mode="window"`` runs the network over overlapping windows of its own size, all in one batch, and blends their
      maps with weights that fall linearly towards the borders of a window. A constant stays constant, and an image of
      one window gets the network's own maps.
    - ``mode="resize"`` resizes the images to the size of the network, and the maps to that of the images.

    Args:
        body: returns a list of maps and has timm's ``feature_info``, as ``timm.create_model(..., features_only=True)``.
        input_size: (H, W) of the images that ``body`` takes, multiples of its reductions; None asks
            ``body.model.img_size``, which Strip-MLP has.
        mode: ``"window"`` or ``"resize"``.
        overlap: share of a window that at least lies in the next one too, in [0, 1); it is rounded up to whole cells
            of the coarsest map, as far as these allow it.
    Shape: (B, 3, H, W) -> ``{"0": (B, C_0, ceil(H / r_0), ceil(W / r_0)), "1": ...}`` with the reductions r.
    Raises:
        TypeError: if ``body`` classifies, that is, was created without ``features_only=True``.
        ValueError: if an argument is out of range, or an image is smaller than a window.
    """

    def __init__(
        self,
        body: nn.Module,
        input_size: tuple[int, int] | None = None,
        *,
        mode: str = "window",
        overlap: float = 0.25,
    ) -> None:
        super().__init__()
        if mode not in ("window", "resize"):
            raise ValueError(f"mode is {mode!r}; known: 'window', 'resize'")
        if not 0.0 <= overlap < 1.0:
            raise ValueError(f"overlap is {overlap}; it must be in [0, 1)")
        if not hasattr(getattr(body, "feature_info", None), "channels"):
            raise TypeError(f"body is a {type(body).__name__} that returns no maps; create it with features_only=True")
        self.body, self.mode, self.overlap = body, mode, overlap
        self.channels: list[int] = body.feature_info.channels()
        self.reductions: list[int] = body.feature_info.reduction()
        self.input_size = to_2tuple(body.model.img_size if input_size is None else input_size)
        if any(side <= 0 or side % max(self.reductions) for side in self.input_size):
            raise ValueError(f"input_size is {self.input_size}; give multiples of {max(self.reductions)}")

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        sizes = [tuple(-(-side // reduction) for side in x.shape[2:]) for reduction in self.reductions]
        if self.mode == "resize":
            maps = self.body(_resize(x, self.input_size))
            maps = [_resize(m, size) for m, size in zip(maps, sizes, strict=True)]
        else:
            maps = [m[:, :, :height, :width] for m, (height, width) in zip(self._windowed(x), sizes, strict=True)]
        return OrderedDict((str(level), m) for level, m in enumerate(maps))

    def _windowed(self, x: Tensor) -> list[Tensor]:
        """Return the blended maps of the image, which is continued to whole cells of the coarsest map."""
        height, width = self.input_size
        if x.shape[2] < height or x.shape[3] < width:
            raise ValueError(
                f"images of {x.shape[2]} x {x.shape[3]} pixels are smaller than a window of {height} x {width}; use "
                'larger images, or DenseBackbone(..., mode="resize")'
            )
        unit = max(self.reductions)
        x = F.pad(x, (0, -x.shape[3] % unit, 0, -x.shape[2] % unit), mode="replicate")
        sides = tuple(x.shape[2:])
        starts = [window_starts(*lengths, unit, self.overlap) for lengths in zip(sides, self.input_size, strict=True)]
        corners = list(product(*starts))
        windows = torch.cat([x[:, :, top : top + height, left : left + width] for top, left in corners])
        maps = self.body(windows)
        return [
            _blend(m.chunk(len(corners)), starts, sides, reduction)
            for m, reduction in zip(maps, self.reductions, strict=True)
        ]


def with_pyramid(backbone: DenseBackbone, out_channels: int = 256) -> nn.Sequential:
    """Return the backbone with a feature pyramid, as torchvision's ``FasterRCNN`` and its relatives take it.

    Its maps have ``out_channels`` channels each; a last one, ``"pool"``, is half as large as the coarsest map.
    """
    pyramid = FeaturePyramidNetwork(backbone.channels, out_channels, LastLevelMaxPool())
    model = nn.Sequential(OrderedDict(backbone=backbone, pyramid=pyramid))
    model.out_channels = out_channels
    return model


def window_starts(side: int, window: int, unit: int, overlap: float) -> list[int]:
    """Return where windows along one side of an image begin: evenly spaced, in multiples of ``unit``, all in pixels.

    Args:
        side: length of the image, a multiple of ``unit`` and at least ``window``.
        window: length of a window, a multiple of ``unit``.
        unit: pixels of a cell of the coarsest map.
        overlap: share of a window that at least lies in the next one too.
    """
    step = max(unit, int(window * (1 - overlap)) // unit * unit)
    gaps = -(-(side - window) // step)
    return [(side - window) // unit * i // max(gaps, 1) * unit for i in range(gaps + 1)]


def _blend(maps: tuple[Tensor, ...], starts: list[list[int]], sides: tuple[int, int], reduction: int) -> Tensor:
    """Return the mean of the windows' maps, weighted at each cell by its distance from their borders.

    Args:
        maps: one (B, C, h, w) for each window, in the order of the product of ``starts``.
        starts: first rows and first columns of the windows, in pixels.
        sides: (H, W) of the image, in pixels.
        reduction: pixels for one cell of the maps.
    """
    like = maps[0]
    rows, columns = (
        _shares([start // reduction for start in begins], length, side // reduction).to(like)
        for begins, length, side in zip(starts, like.shape[2:], sides, strict=True)
    )
    out = like.new_zeros(*like.shape[:2], *(side // reduction for side in sides))
    windows = product(zip(starts[0], rows, strict=True), zip(starts[1], columns, strict=True))
    for m, ((top, row), (left, column)) in zip(maps, windows, strict=True):
        top, left = top // reduction, left // reduction
        out[:, :, top : top + m.shape[2], left : left + m.shape[3]] += m * row[:, None] * column
    return out


def _shares(starts: list[int], length: int, side: int) -> Tensor:
    """Return the weights of the windows' cells along one side, float64 (windows, length), which sum to 1 at a cell."""
    hat = torch.arange(1, length + 1, dtype=torch.float64)
    hat = torch.minimum(hat, hat.flip(0))
    total = torch.zeros(side, dtype=torch.float64)
    for start in starts:
        total[start : start + length] += hat
    return torch.stack([hat / total[start : start + length] for start in starts])


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the map in another size, bilinear, with antialiasing when shrinking."""
    return F.interpolate(x, size=size, mode="bilinear", antialias=True)
