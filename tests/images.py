"""Small generated images and configurations for the tests of the data package."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "emu")
SIZES = ((37, 52), (60, 41), (48, 48), (33, 90))  # (height, width), pixels


def picture(seed: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
    """Return a smooth random RGB image of ``size`` = (height, width): compressible, but with detail everywhere."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8))


def write_folder(root: Path, classes: Sequence[str] = CLASSES, count: int = 5, suffix: str = "jpg") -> Path:
    """Write ``root/CLASS/NUMBER.suffix`` with images of several sizes; return ``root``."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            image = picture(100 * label + number, SIZES[(label + number) % len(SIZES)])
            image.save(root / name / f"{number}.{suffix}")
    return root


def write_splits(root: Path, classes: Sequence[str] = CLASSES, train: int = 5, val: int = 3) -> Path:
    """Write ``root/train`` and ``root/val``; return ``root``."""
    write_folder(root / "train", classes, train)
    write_folder(root / "val", classes, val)
    return root
