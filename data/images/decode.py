"""Decode image files to RGB, grey or multi-channel pixels, or to an error that says what is wrong.

Two decoders give the same pixels: Pillow reads every format; simplejpeg, when installed, reads ordinary JPEG files
about 1.2 times as fast. Nothing is repaired silently: a truncated file is an error, 16-bit values are scaled to 8 bits
instead of clipped, and pixel formats without a known range are refused. Like torchvision's ImageFolder, decoding
ignores the EXIF orientation and drops an alpha channel, unless as many channels as there are bands are asked for.
"""

from io import BytesIO

import numpy as np
from PIL import Image

from utils.errors import ImageReadError

try:
    import simplejpeg
except ImportError:  # optional: Pillow decodes the same pixels
    simplejpeg = None

# PIL image of mode RGB or L, or uint8 array (H, W, C); always an array where C is neither 3 nor 1
Picture = Image.Image | np.ndarray

_JPEG_START = b"\xff\xd8"
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM", "TIFF")
_MODES = {3: "RGB", 1: "L"}  # channels -> Pillow's mode
_SAMPLES_PER_PIXEL = 277  # number of a TIFF tag


def decode_image(data: bytes, *, as_array: bool, channels: int = 3) -> Picture:
    """Decode the content of an image file.

    Args:
        data: the whole file.
        as_array: allow the fast decoder; the result is then an array (H, W, 3) for ordinary JPEG files and a PIL image
            for everything else. Otherwise RGB and grey images are always PIL images. The pixels are the same.
        channels: 3 for RGB and 1 for grey, to which every image is converted. Any other number takes the bands as they
            are stored: of an image with so many (PNG or TIFF with alpha, CMYK), or of a TIFF with a grey page for each.

    Raises:
        ImageReadError: empty, truncated, broken, too large, of a pixel format that has no 8-bit meaning, or with
            another number of channels than it must have.
    """
    if not data:
        raise ImageReadError("the file is empty (0 bytes)")
    if as_array and channels == 3 and simplejpeg is not None and data[:2] == _JPEG_START:
        pixels = _decode_plain_jpeg(data)
        if pixels is not None:
            return pixels
    try:
        with Image.open(BytesIO(data)) as image:
            return _to_mode(image, _MODES[channels]) if channels in _MODES else _to_bands(image, channels)
    except ImageReadError:
        raise
    except Exception as error:  # Pillow's plugins raise many types for foreign bytes (OSError, SyntaxError, ...)
        detail = str(error)
        if "BytesIO" in detail:  # Pillow's message names our buffer instead of a file
            detail = "not an image of a known format"
            if channels not in _MODES:
                detail += f"; {channels} channels can be stored as a TIFF with a grey page for each"
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


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Load an opened image and convert it to RGB or L, scaling 16-bit grey values instead of clipping them."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS[:2]):
        wide = np.asarray(image).astype(np.uint32)  # 0..65535
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        raise ImageReadError(
            f"{image.format} image of mode {image.mode} (32-bit values of unknown range); convert it to 8 or 16 bits"
        )
    if image.mode == "P":
        image.load()
        image.info.pop("transparency", None)  # dropped by the conversion anyway, with a warning for each image
    return image.convert(mode)


def _to_bands(image: Image.Image, channels: int) -> np.ndarray:
    """Return the bands of an opened image as they are stored, or the pages of a TIFF, uint8 (H, W, channels)."""
    if image.format == "TIFF" and getattr(image, "n_frames", 1) == channels:
        pages = []
        for number in range(channels):
            image.seek(number)
            if len(image.getbands()) > 1 or (pages and image.size != pages[0].size):
                raise ImageReadError(f"page {number + 1} of {channels} is not a grey image of the size of the first")
            pages.append(_to_mode(image, "L"))
        return np.stack([np.asarray(page) for page in pages], axis=2)
    if image.mode in ("P", "PA"):
        image.load()
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    bands = image.getbands()
    if len(bands) == channels:
        return np.array(image)
    samples = image.tag_v2.get(_SAMPLES_PER_PIXEL, 0) if image.format == "TIFF" else 0
    unread = f", the rest of its {samples} samples per pixel unread" if samples > len(bands) else ""
    raise ImageReadError(
        f"{image.format or 'an'} image of {len(bands)} channel(s) ({image.mode}{unread}), but {channels} are needed "
        "(MODEL.STRIP_MLP.IN_CHANS): PNG and TIFF with alpha have 2 or 4, a TIFF can have a grey page for each"
    )
