"""Make one batch of samples."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_SHARES = hasattr(os, "memfd_create")  # Linux

Sample = tuple[np.ndarray | Tensor, int, int]  # image, target, index


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch of samples: images (B, C, H, W), and int64 targets and indices (B,)."""
    return as_tensors(collate_arrays(samples))


def collate_arrays(samples: Sequence[Sample]) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Return a batch whose targets and indices are arrays, as a worker sends it.

    Float tensors (C, H, W) are stacked as published. uint8 arrays (H, W, C) are copied one after another, which is four
    times as fast as transposing them to NCHW, and returned as a view (B, C, H, W), hence channels last. Targets and
    indices become tensors only at their destination, because each tensor travels in a shared memory segment of its own,
    which takes a millisecond to open.
    """
    pictures, targets, indices = zip(*samples, strict=True)
    stack = _stack_shared if _SHARES and get_worker_info() is not None else _stack
    if isinstance(pictures[0], Tensor):
        images = stack([picture.contiguous().numpy() for picture in pictures])
    else:
        images = stack(pictures).permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
    return images, np.array(targets, dtype=np.int64), np.array(indices, dtype=np.int64)


def as_tensors(batch: tuple[Tensor, np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch of ``collate_arrays`` as tensors."""
    images, targets, indices = batch
    return images, torch.from_numpy(targets), torch.from_numpy(indices)


def _stack(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))


def _stack_shared(pictures: Sequence[np.ndarray]) -> Tensor:
    """Stack pictures in a memory file, which travels to the main process without another copy.

    Writing to the file fills new pages twice as fast as storing into mapped memory does. Unlike torch's own shared
    memory, a memory file does not count towards /dev/shm, which containers make too small for batches of images.
    """
    file = os.memfd_create("batch", os.MFD_CLOEXEC)
    try:
        for picture in pictures:
            if os.write(file, picture) != picture.nbytes:
                raise OSError(f"no memory for a batch of {len(pictures)} images of {picture.nbytes} bytes")
        # as torch.multiprocessing opens the memory files that it receives
        storage = torch.UntypedStorage._new_shared_fd_cpu(file, len(pictures) * pictures[0].nbytes)
    finally:
        os.close(file)
    dtype = torch.from_numpy(np.empty(0, pictures[0].dtype)).dtype  # read-only arrays would give a warning
    return torch.empty(0, dtype=dtype).set_(storage, 0, (len(pictures), *pictures[0].shape))
