"""Data sets that other libraries provide: CIFAR through torchvision, handwritten digits through scikit-learn."""

from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets as torchvision_datasets

from data.sources.base import ArraySource
from utils.runtime import once_per_machine

_DIGITS_SIZE = 32  # pixels
_DIGITS_SPLIT_SEED = 1024
_DIGITS_VAL_RATIO = 0.2


def cifar_source(name: str, root: str, *, is_train: bool, download: bool, **images: Any) -> ArraySource:
    """Return CIFAR-10 or CIFAR-100 (``name``) from torchvision's files under ``root``.

    With ``download``, one process of each machine downloads what is missing while the others wait. ``images``:
    ``as_array`` and ``channels`` of ``ArraySource``.

    Raises:
        FileNotFoundError: the files are missing or damaged.
        RuntimeError: the download failed, on all processes alike.
    """
    factory = getattr(torchvision_datasets, name)
    if download:
        once_per_machine(lambda: factory(root, train=is_train, download=True), what=f"the download of {name} to {root}")
    try:
        dataset = factory(root, train=is_train, download=False)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name} was not found in DATA.DATA_PATH={root!r}, or its files are damaged; set DATA.DOWNLOAD True or "
            "unpack the archive of its Python version there"
        ) from error
    return ArraySource(dataset.data, dataset.targets, dataset.classes, title=name, **images)


def digits_source(*, is_train: bool, **images: Any) -> ArraySource:
    """Return scikit-learn's 1,797 handwritten digits, enlarged from 8x8 to 32x32 pixels (bicubic), grey as RGB.

    The split is fixed: of each digit, the first 20 % of a permutation (seed 1024) are held out. numpy never changes
    the stream of ``RandomState``, so every version makes the same split. ``images``: ``as_array`` and ``channels`` of
    ``ArraySource``.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # imported here: only this data set needs it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("DATA.DATASET 'digits' needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    random = np.random.RandomState(_DIGITS_SPLIT_SEED)
    chosen = []
    for label in range(10):
        members = random.permutation(np.flatnonzero(digits.target == label))
        held_out = round(_DIGITS_VAL_RATIO * len(members))
        chosen.append(members[held_out:] if is_train else members[:held_out])
    indices = np.sort(np.concatenate(chosen))
    grey = np.rint(digits.images[indices] * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    size = (_DIGITS_SIZE, _DIGITS_SIZE)
    rgb = [np.asarray(Image.fromarray(g).resize(size, Image.Resampling.BICUBIC).convert("RGB")) for g in grey]
    names = [str(label) for label in range(10)]
    return ArraySource(np.stack(rgb), digits.target[indices], names, title="digits", **images)
