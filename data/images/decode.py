"""Decode image files to RGB pixels, or to an error that says what is wrong.

Two decoders give the same pixels: Pillow reads every format; simplejpeg, when installed, reads ordinary JPEG files
about 1.2 times as fast. Nothing is repaired silently: a truncated file is an error, 16-bit values are scaled to 8 bits
instead of clipped, and pixel formats without a known range are refused. Like torchvision's ImageFolder, decoding
ignores the EXIF orientation and drops an alpha channel.
"""

from io import BytesIO

import numpy as np
from PIL import Image

from utils.errors import ImageReadError

try:
    import simplejpeg
except ImportError:  # optional: Pillow decodes the same pixels
    simplejpeg = None

Picture = Image.Image | np.ndarray  # PIL image of mode RGB, or uint8 array (H, W, 3)

_JPEG_START = b"\xff\xd8"
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM", "TIFF")


def decode_image(data: bytes, *, as_array: bool) -> Picture:
    """Decode the content of an image file to RGB.

    Args:
        data: the whole file.
        as_array: allow the fast decoder; the result is then an array (H, W, 3) for ordinary JPEG files and a PIL image
            for everything else. Otherwise the result is always a PIL image. The pixels are the same.

    Raises:
        ImageReadError: empty, truncated, broken, too large or of a pixel format that has no 8-bit meaning.
    """
    if not data:
        raise ImageReadError("the file is empty (0 bytes)")
    if as_array and simplejpeg is not None and data[:2] == _JPEG_START:
        pixels = _decode_plain_jpeg(data)
        if pixels is not None:
            return pixels
    try:
        with Image.open(BytesIO(data)) as image:
            return to_rgb(image)
    except ImageReadError:
        raise
    except Exception as error:  # Pillow's plugins raise many types for foreign bytes (OSError, SyntaxError, ...)
        detail = str(error)
        if "BytesIO" in detail:  # Pillow's message names our buffer instead of a file
            detail = "not an image of a known format"
        raise ImageReadError(f"{detail or 'decoding failed'} [{type(error).__name__}]") from error


def jpeg_complaint(data: bytes) -> str | None:
    """Return libjpeg's complaint about a JPEG file that decoders accept nevertheless, or None.

    Garbage inside the compressed data leaves wrong pixels without an error. Always None without simplejpeg.
    """
    if simplejpeg is None or data[:2] != _JPEG_START:
        return None
    try:
        if simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "Gray"):
            simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        return str(error)
    return None


def _decode_plain_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a YCbCr or grey JPEG file; None where Pillow has to decide (CMYK, damaged, huge)."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        limit = Image.MAX_IMAGE_PIXELS
        if colorspace not in ("YCbCr", "Gray") or (limit is not None and height * width > limit):
            return None
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:  # strict: Pillow either accepts the file, as the published code did, or names the fault
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Load an opened image and convert it to RGB, scaling 16-bit grey values instead of clipping them.

    Raises:
        ImageReadError: a pixel format that has no 8-bit meaning.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS[:2]):
        wide = np.asarray(image).astype(np.uint32)  # 0..65535
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageReadError(
            f"{image.format} image of mode {image.mode} (32-bit values of unknown range); convert it to 8 or 16 bits"
        )
    if image.mode == "P":
        image.load()
        image.info.pop("transparency", None)  # dropped by the conversion anyway, with a warning for each image
    return image.convert("RGB")
