"""Grad-CAM: which pixels speak for the predicted class."""

from collections.abc import Iterable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import Opened
from tools.common import shortened
from tools.figures import grid, put_title
from tools.receptive_field import as_map, stages_of
from utils.config import input_shape
from utils.errors import RunError
from utils.training import shown_channels

CAM_SIDE = 4  # rows and columns of a map that is worth looking at


def draw_cams(opened: Opened, batches: Iterable[Tensor], count: int) -> Figure:
    """Return Grad-CAM overlays for the predicted class, from the last stage with at least ``CAM_SIDE`` rows.

    Args:
        opened: the checkpoint.
        batches: normalised images (B, 3, H, W).
        count: number of images in all batches.

    Raises:
        RunError: the package is missing, or no map is large enough.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.image import show_cam_on_image
    except ImportError as error:
        raise RunError("Grad-CAM needs the package grad-cam; see requirements-extra.txt") from error
    if input_shape(opened.config)[0] != 3:
        raise RunError(f"Grad-CAM is drawn over RGB images; the network takes {input_shape(opened.config)[0]} channels")
    side = min(input_shape(opened.config)[1:])
    large = [stage for stage in stages_of(opened.model) if side // stage.reduction >= CAM_SIDE]
    if not large:
        raise RunError(f"no stage has a map of {CAM_SIDE} rows at DATA.IMG_SIZE {side}; use larger images")
    layer, channels, reduction = large[-1]
    mean, std = (torch.tensor(opened.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    figure, axes = grid(-(-count // 6), min(6, count))
    title = f"Grad-CAM, maps of {side // reduction} rows: red speaks for the predicted class"
    figure.suptitle(title, fontsize=9)
    places = iter(axes)
    with GradCAM(opened.model, [layer], reshape_transform=lambda output: as_map(output, channels)) as cam:
        for batch in batches:
            masks = cam(input_tensor=batch, targets=None)  # for the class with the largest score
            best = opened.model(batch).softmax(dim=1).max(dim=1)
            for image, mask, share, label in zip(batch.cpu(), masks, *(part.tolist() for part in best), strict=True):
                pixels = shown_channels((image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
                ax = next(places)
                ax.imshow(show_cam_on_image(pixels, mask, use_rgb=True))
                put_title(ax, f"{shortened(opened.names[label], 22)}: {100 * share:.1f} %")
    return figure
