"""Keep timm's Posterize working with Pillow 13, as the published recipe used it."""

from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp
from torchvision import transforms


def allow_zero_bits(transform: transforms.Compose) -> None:
    """Let the Posterize operations of timm keep 0 bits, in this transform only.

    The published RandAugment asks for 0 bits when its random magnitude reaches 10 (about one image in 700). Pillow up
    to version 12 returned a black image, Pillow 13 raises ValueError. The black image is part of the recipe.
    """
    for operation in _augment_ops(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """Keep the highest ``bits_to_keep`` bits of each value; 0 bits give a black image."""
    if bits_to_keep >= 8:
        return image
    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return ImageOps.posterize(image, bits_to_keep)


def _augment_ops(transform: object) -> list[AugmentOp]:
    """Return the elementary operations of timm inside a transform; its augmentation policies nest them in lists."""
    if isinstance(transform, AugmentOp):
        return [transform]
    if isinstance(transform, list | tuple):
        parts = transform
    else:
        parts = [getattr(transform, name, ()) for name in ("transforms", "ops", "policy")]
    return [operation for part in parts for operation in _augment_ops(part)]
