"""From samples to one batch."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def collate(samples: list[tuple[np.ndarray | Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Make a batch (images, targets, indices) of a data set's samples.

    uint8 arrays (S, S, 3) are copied one after another, which is four times as fast as interleaving them into NCHW,
    and handed out as a view (B, 3, S, S), hence channels last.
    """
    pictures, targets, indices = zip(*samples, strict=True)
    if isinstance(pictures[0], Tensor):
        images = torch.stack(pictures)
    else:
        images = _shared_empty((len(pictures), *pictures[0].shape))
        rows = images.numpy()
        for row, picture in zip(rows, pictures, strict=True):
            row[...] = picture
        images = images.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
    return images, torch.tensor(targets, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64)


def _shared_empty(shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialised uint8 tensor; in a worker in shared memory, so that sending it copies nothing."""
    batch = torch.empty(shape, dtype=torch.uint8)
    return batch if get_worker_info() is None else batch.share_memory_()
