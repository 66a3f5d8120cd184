"""Decoding: every kind of file is either the right RGB pixels or an error that says why."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.images import decode
from data.images.decode import decode_image, jpeg_complaint
from tests.images import picture
from utils.errors import ImageReadError


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(values: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG of ``values`` (H, W) or (H, W, channels), written by hand."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


PHOTO = picture(1, (61, 83))
KINDS = {
    "4:2:0": encoded(PHOTO, quality=90),
    "4:4:4": encoded(PHOTO, quality=95, subsampling=0),
    "progressive": encoded(PHOTO, progressive=True),
    "grey": encoded(PHOTO.convert("L")),
    "CMYK": encoded(PHOTO.convert("CMYK")),
    "RGB jpeg": encoded(PHOTO, keep_rgb=True),
    "one pixel": encoded(PHOTO.resize((1, 1))),
    "EXIF rotated": encoded(PHOTO, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "profile": encoded(PHOTO, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "PNG": encoded(PHOTO, "PNG"),
    "PNG with alpha": encoded(PHOTO.convert("RGBA"), "PNG"),
    "palette": encoded(PHOTO.convert("P"), "PNG"),
    "palette with transparency": encoded(PHOTO.convert("P"), "PNG", transparency=bytes(range(256))),
    "black and white": encoded(PHOTO.convert("1"), "PNG"),
    "GIF": encoded(PHOTO, "GIF"),
    "BMP": encoded(PHOTO, "BMP"),
    "WebP": encoded(PHOTO, "WEBP"),
    "TIFF": encoded(PHOTO, "TIFF"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_both_decoders_give_torchvisions_pixels(kind):
    data = KINDS[kind]
    with Image.open(io.BytesIO(data)) as image:
        image.info.pop("transparency", None)  # only silences Pillow's warning
        expected = np.asarray(image.convert("RGB"))  # what ImageFolder's loader does
    plain = decode_image(data, as_array=False)
    assert plain.mode == "RGB"
    assert np.array_equal(np.asarray(plain), expected)
    assert np.array_equal(np.asarray(decode_image(data, as_array=True)), expected)


def test_ordinary_jpegs_take_the_fast_decoder_and_others_do_not():
    pytest.importorskip("simplejpeg")
    fast = {kind for kind, data in KINDS.items() if isinstance(decode_image(data, as_array=True), np.ndarray)}
    assert {"4:2:0", "4:4:4", "progressive", "grey", "EXIF rotated", "profile"} <= fast
    assert not fast & {"CMYK", "RGB jpeg", "PNG", "GIF"}


@pytest.mark.parametrize("kind", ("4:2:0", "grey"))
def test_same_pixels_without_the_fast_decoder(kind, monkeypatch):
    expected = np.asarray(decode_image(KINDS[kind], as_array=True))
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert np.array_equal(np.asarray(decode_image(KINDS[kind], as_array=True)), expected)


def test_exif_orientation_is_ignored_as_published():
    assert decode_image(KINDS["EXIF rotated"], as_array=False).size == (83, 61)


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for data in (png16(values, 0), encoded(Image.fromarray(values), "TIFF"), encoded(Image.fromarray(values), "PPM")):
        pixels = np.asarray(decode_image(data, as_array=True))
        assert np.array_equal(pixels, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_16_bit_colour_keeps_the_high_byte():
    values = np.random.default_rng(0).integers(0, 65536, (9, 11, 3))
    pixels = np.asarray(decode_image(png16(values, 2), as_array=True)).astype(int)
    assert np.abs(pixels - values / 257).max() <= 1


@pytest.mark.parametrize("dtype", (np.int32, np.float32))
def test_values_of_unknown_range_are_refused(dtype):
    data = encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")
    with pytest.raises(ImageReadError, match="unknown range"):
        decode_image(data, as_array=True)


HALF = KINDS["4:2:0"][: len(KINDS["4:2:0"]) // 2]


@pytest.mark.parametrize("as_array", (True, False))
@pytest.mark.parametrize(
    ("data", "reason"),
    (
        (b"", "empty"),
        (HALF, "truncated"),
        (KINDS["4:2:0"][:-2], "truncated"),
        (KINDS["4:2:0"][:200], "runcated"),
        (KINDS["PNG"][:-30], "truncated"),
        (KINDS["PNG"][:70] + b"\0" * 40 + KINDS["PNG"][110:], "."),
        (b"<html>not found</html>", "not an image"),
        (b"\xff\xd8" + b"junk" * 50, "."),
    ),
)
def test_broken_files_are_errors(data, reason, as_array):
    with pytest.raises(ImageReadError, match=reason):
        decode_image(data, as_array=as_array)


@pytest.mark.parametrize("kind", ("PNG", "JPEG"))
def test_decompression_bomb_is_refused(kind, monkeypatch):
    data = encoded(Image.new("RGB", (64, 64)), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(ImageReadError, match="decompression bomb"):
        decode_image(data, as_array=True)


def test_garbage_inside_a_jpeg_is_noticed_though_decoders_accept_it():
    pytest.importorskip("simplejpeg")
    data = bytearray(encoded(picture(0, (256, 256)), quality=95))
    middle = len(data) // 2
    data[middle : middle + 60] = b"\xff\xd0" + b"\x5a" * 58
    decode_image(bytes(data), as_array=True)
    assert jpeg_complaint(bytes(data))
    assert jpeg_complaint(KINDS["4:2:0"]) is None
    assert jpeg_complaint(KINDS["CMYK"]) is None
    assert jpeg_complaint(KINDS["PNG"]) is None
