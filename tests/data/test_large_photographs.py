"""Large JPEG files are decoded no larger than needed: the same crops and errors, nearly the same pixels."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

import data.images.decode as decoding
from data import build_dataset
from data.images.decode import ScalableJpeg, decode_image
from data.images.resize import EvalResize, ResizedCrop, torch_resize
from tests.builders import data_config
from utils.errors import ImageReadError
from utils.runtime import seeded_streams

HEIGHT, WIDTH = 701, 907  # multiples of no reduction


def photograph(mode: str = "RGB") -> Image.Image:
    """Return a picture in which each place has its own colour, with some texture."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    bands = (255 * rows / HEIGHT, 255 * columns / WIDTH, 128 + 40 * np.sin(rows / 9) * np.cos(columns / 7))
    return Image.fromarray(np.stack(bands, axis=2).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def transforms(size: int = 40):
    crop = RandomResizedCropAndInterpolation((size, size), interpolation="bicubic")
    yield ResizedCrop(crop, resize=torch_resize)
    for centre in (True, False):
        yield EvalResize(size, crop=centre, interpolation="bicubic", resize=torch_resize)


@pytest.mark.parametrize("mode", ("RGB", "L"))
def test_both_decoders_reduce_to_the_same_pixels(monkeypatch, mode):
    pytest.importorskip("simplejpeg")
    jpeg = ScalableJpeg(encoded(photograph(mode)))
    fast = [np.asarray(jpeg.decode(reduction)) for reduction in (1, *ScalableJpeg.REDUCTIONS)]
    monkeypatch.setattr(decoding, "simplejpeg", None)
    jpeg = ScalableJpeg(encoded(photograph(mode)))
    assert (jpeg.height, jpeg.width) == (HEIGHT, WIDTH)
    for reduction, pixels in zip((1, *ScalableJpeg.REDUCTIONS), fast, strict=True):
        assert pixels.shape == (-(-HEIGHT // reduction), -(-WIDTH // reduction), 3)
        assert np.array_equal(pixels, np.asarray(jpeg.decode(reduction)))


def test_the_same_crops_and_nearly_the_same_pixels():
    data = encoded(photograph(), quality=95)
    for transform in transforms():
        for seed in range(8):
            with seeded_streams(seed):
                whole = np.asarray(transform(decode_image(data, as_array=True))).astype(int)
            with seeded_streams(seed):
                scaled = np.asarray(transform(ScalableJpeg(data))).astype(int)
            # one pixel further in the source is 0.3 in the first two colours; a crop that is off by 4 pixels fails
            assert np.abs(whole - scaled).mean() < 0.5
            assert np.abs((whole - scaled)[..., :2].mean(axis=(0, 1))).max() < 0.3


def test_what_is_not_much_larger_than_needed_keeps_its_pixels():
    data = encoded(photograph().resize((120, 90)))
    for transform in transforms():
        with seeded_streams(3):
            whole = np.asarray(transform(decode_image(data, as_array=True)))
        with seeded_streams(3):
            assert np.array_equal(np.asarray(transform(ScalableJpeg(data))), whole)


def test_whole_reduced_pixels_are_resized_like_any_other_picture():
    """The size is a multiple of the reduction, as that of cameras is."""
    data = encoded(photograph().resize((640, 480)))
    transform = EvalResize(64, crop=True, interpolation="bicubic", resize=torch_resize)
    assert np.array_equal(transform(ScalableJpeg(data)), transform(ScalableJpeg(data).decode(2)))


@pytest.mark.parametrize("damage", ("truncated", "garbage"))
def test_damaged_files_are_errors(damage):
    data = encoded(photograph())
    data = data[: len(data) // 2] if damage == "truncated" else b"\xff\xd8 not a photograph"
    with pytest.raises(ImageReadError):
        ScalableJpeg(data).decode(4)


def test_data_sets_decode_small_and_read_every_format(tmp_path, monkeypatch):
    for part in ("train", "val"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            (tmp_path / part / label / "0.jpg").write_bytes(encoded(photograph()))
            (tmp_path / part / label / "1.png").write_bytes(encoded(photograph(), "PNG"))
            (tmp_path / part / label / "2.jpg").write_bytes(encoded(photograph("CMYK")))
    reductions = []
    decode = ScalableJpeg.decode
    monkeypatch.setattr(ScalableJpeg, "decode", lambda self, r: reductions.append(r) or decode(self, r))
    images = {}
    for fast, cache in ((True, "off"), (True, "ram"), (False, "off")):
        keys = {"DATA__DATA_PATH": tmp_path, "DATA__IMG_SIZE": 64, "MODEL__NUM_CLASSES": 2}
        config = data_config(**keys, DATA__FAST_RESIZE=fast, DATA__CACHE_DECODED=cache)
        dataset = build_dataset(config, is_train=False)
        images[fast, cache] = [dataset[index][0].astype(int) for index in range(len(dataset))]
        assert reductions == ([4, 4] if (fast, cache) == (True, "off") else []), "one JPEG file in RGB a class"
        reductions.clear()
        assert len(build_dataset(config, is_train=True)[0, 0]) == 3
        reductions.clear()
    for small, whole in zip(images[True, "off"], images[True, "ram"], strict=True):
        assert np.abs(small - whole).mean() < 0.5
