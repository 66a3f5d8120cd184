"""Images of other channels than RGB, and rectangles: decoding, transforms, caches, normalisation."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms

from data import build_batch_transform, build_dataset, build_train_loader, build_val_loader, decode_image
from data.images.resize import pil_resize, torch_resize
from data.images.transforms import build_transform
from data.sources.base import ArraySource
from tests.builders import data_config
from tests.images import picture, write_splits
from utils.errors import ImageReadError
from utils.runtime.random_state import seeded_streams

PLAIN = {"AUG__AUTO_AUGMENT": "none", "AUG__COLOR_JITTER": 0.0, "AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0}


def bands(channels: int, size: tuple[int, int] = (40, 56), seed: int = 0) -> np.ndarray:
    """Return smooth random pixels (H, W, channels)."""
    return np.concatenate([np.asarray(picture(seed + c, size))[..., :1] for c in range(channels)], axis=2)


def encoded(*images: Image.Image, suffix: str = "png") -> bytes:
    stream = BytesIO()
    more = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    images[0].save(stream, suffix, **more)
    return stream.getvalue()


def of_mode(mode: str, pixels: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes())


# --- decoding ---


@pytest.mark.parametrize("as_array", (True, False))
def test_every_image_becomes_grey(as_array):
    colour = picture(0)
    for image in (colour, colour.convert("RGBA"), colour.convert("P"), colour.convert("LA"), colour.convert("1")):
        grey = decode_image(encoded(image), as_array=as_array, channels=1)
        assert grey.mode == "L"
        assert np.array_equal(grey, image.convert("L"))
    grey = decode_image(encoded(colour, suffix="jpeg"), as_array=as_array, channels=1)
    rgb = decode_image(encoded(colour, suffix="jpeg"), as_array=False)
    assert np.array_equal(grey, rgb.convert("L"))
    wide = Image.fromarray(bands(1)[..., 0].astype(np.uint16) * 257)
    assert np.array_equal(decode_image(encoded(wide), as_array=True, channels=1), bands(1)[..., 0])


@pytest.mark.parametrize(
    ("mode", "suffix"), (("RGBA", "png"), ("RGBA", "tiff"), ("CMYK", "tiff"), ("LA", "png"), ("LA", "tiff"))
)
def test_bands_stay_as_they_are_stored(mode, suffix):
    pixels = bands(len(mode))
    decoded = decode_image(encoded(of_mode(mode, pixels), suffix=suffix), as_array=False, channels=len(mode))
    assert np.array_equal(decoded, pixels)


@pytest.mark.parametrize("dtype", (np.uint8, np.uint16))
@pytest.mark.parametrize("channels", (2, 4, 7))
def test_pages_of_a_tiff_are_channels(channels, dtype):
    pixels = bands(channels)
    scale = 257 if dtype is np.uint16 else 1
    pages = [Image.fromarray(page.astype(dtype) * dtype(scale)) for page in np.moveaxis(pixels, 2, 0)]
    assert np.array_equal(decode_image(encoded(*pages, suffix="tiff"), as_array=True, channels=channels), pixels)


def test_a_palette_with_transparency_has_four_channels():
    image = picture(0).convert("P")
    image.info["transparency"] = 0
    stream = BytesIO()
    image.save(stream, "png", transparency=0)
    assert np.array_equal(
        decode_image(stream.getvalue(), as_array=True, channels=4), Image.open(stream).convert("RGBA")
    )


def uneven_pages() -> bytes:
    return encoded(picture(0).convert("L"), picture(0, (9, 9)).convert("L"), suffix="tiff")


@pytest.mark.parametrize(
    ("data", "channels", "complaint"),
    (
        (encoded(picture(0)), 4, r"PNG image of 3 channel\(s\) \(RGB\), but 4 are needed \(MODEL.STRIP_MLP.IN_CHANS\)"),
        (encoded(picture(0).convert("RGBA")), 2, r"4 channel\(s\)"),
        (encoded(picture(0).convert("P")), 4, r"3 channel\(s\) \(RGB\)"),
        (uneven_pages(), 2, "page 2 of 2 is not a grey image of the size of the first"),
        (encoded(picture(0), picture(1), suffix="tiff"), 2, "page 1 of 2 is not a grey image"),
        (b"II*\0nonsense", 6, "6 channels can be stored as a TIFF with a grey page for each"),
    ),
)
def test_other_numbers_of_channels_are_refused(data, channels, complaint):
    with pytest.raises(ImageReadError, match=complaint):
        decode_image(data, as_array=True, channels=channels)


def test_bands_that_pillow_leaves_out_are_counted():
    pixels = np.arange(4 * 5 * 4, dtype=np.uint8).reshape(4, 5, 4)
    with pytest.raises(ImageReadError, match=r"3 channel\(s\) \(RGB, the rest of its 4 samples per pixel unread\)"):
        decode_image(unspecified_fourth_band(pixels), as_array=True, channels=4)


def unspecified_fourth_band(pixels: np.ndarray) -> bytes:
    """A TIFF whose fourth band is not said to be alpha, of which Pillow gives three."""
    data = encoded(of_mode("RGBA", pixels), suffix="tiff")
    entry = b"\x52\x01\x03\x00\x01\x00\x00\x00"  # ExtraSamples, one short
    assert data.count(entry) == 1
    start = data.index(entry) + len(entry)
    return data[:start] + b"\0\0" + data[start + 2 :]


# --- transforms ---


@pytest.mark.parametrize(
    "policy", ("rand-m9-n8-mstd0.5-inc1", "rand-m10-n8-t3a", "augmix-m3-w3", "v0", "original", "3a")
)
@pytest.mark.parametrize("pipeline", ("fast", "reference"))
def test_grey_images_go_through_every_policy(policy, pipeline):
    keys = {"AUG__AUTO_AUGMENT": policy, "DATA__PIPELINE": pipeline, "MODEL__STRIP_MLP__IN_CHANS": 1}
    transform = build_transform(data_config(**keys), is_train=True)
    image = picture(0).convert("L")
    for seed in range(40):
        with seeded_streams(0, seed):
            pixels = transform(image)
    assert pixels.shape == ((40, 40, 1) if pipeline == "fast" else (1, 40, 40))


def test_grey_jitter_and_evaluation_are_the_references():
    keys = {"MODEL__STRIP_MLP__IN_CHANS": 1, "AUG__AUTO_AUGMENT": "none", "AUG__REPROB": 0.0}
    image = picture(3).convert("L")
    for is_train in (True, False):
        fast, reference = (
            build_transform(data_config(DATA__PIPELINE=p, **keys), is_train=is_train) for p in ("fast", "reference")
        )
        with seeded_streams(5):
            pixels = fast(image)
        with seeded_streams(5):
            expected = reference(image)
        assert pixels.shape == (40, 40, 1)
        normalised = (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - 0.449) / 0.226
        torch.testing.assert_close(normalised, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", (2, 4, 7))
@pytest.mark.parametrize("resize", (pil_resize, torch_resize))
def test_bands_are_scaled_one_by_one(channels, resize):
    pixels = bands(channels)
    whole = resize(pixels, (24, 20), "bicubic")
    for c in range(channels):
        one = np.asarray(resize(pixels[..., c : c + 1], (24, 20), "bicubic")).reshape(24, 20)
        assert np.array_equal(whole[..., c], one)


@pytest.mark.parametrize("size", ((16, 32), (48, 32)))
def test_training_crops_and_mirrors_bands_alike(size):
    keys = {"MODEL__STRIP_MLP__IN_CHANS": 5, "DATA__IMG_SIZE": size, **PLAIN}
    pixels = np.repeat(bands(1), 5, axis=2)
    train, val = (build_transform(data_config(**keys), is_train=is_train) for is_train in (True, False))
    seen = set()
    for seed in range(8):
        with seeded_streams(0, seed):
            out = train(pixels)
        assert out.shape == (*size, 5)
        assert out.dtype == np.uint8
        assert (out == out[..., :1]).all()
        seen.add(out.tobytes())
    assert len(seen) > 4
    assert val(pixels).shape == (*size, 5)
    keys["AUG__HFLIP"] = 1.0
    with seeded_streams(1):
        mirrored = build_transform(data_config(**keys), is_train=True)(pixels)
    keys["AUG__HFLIP"] = 0.0
    with seeded_streams(1):
        assert np.array_equal(build_transform(data_config(**keys), is_train=True)(pixels)[:, ::-1], mirrored)


@pytest.mark.parametrize("size", ((64, 96), (96, 64)))
@pytest.mark.parametrize("shape", ((100, 100), (300, 80), (80, 300), (64, 96), (75, 113), (10, 9)))
def test_evaluation_of_a_rectangle_covers_it_and_crops_the_centre(size, shape):
    image = picture(0, shape)
    transform = build_transform(data_config(DATA__IMG_SIZE=size), is_train=False)
    pixels = transform(image)
    assert pixels.shape == (*size, 3)
    least = [int(256 / 224 * side) for side in size]
    scale = max(least[0] / shape[0], least[1] / shape[1])
    scaled = [int(round(side * scale, 6)) for side in shape]
    resized = pil_resize(image, tuple(scaled), "bicubic")
    assert np.array_equal(pixels, transforms.CenterCrop(size)(resized))
    close = ResizeKeepRatio(least, longest=0, interpolation="bicubic")(image)  # timm's, which rounds
    assert abs(close.height - scaled[0]) <= 1
    assert abs(close.width - scaled[1]) <= 1
    squashed = build_transform(data_config(DATA__IMG_SIZE=size, TEST__CROP=False), is_train=False)(image)
    assert np.array_equal(squashed, pil_resize(image, size, "bicubic"))


def test_training_on_rectangles_is_timms():
    size, keys = (48, 80), {"AUG__REPROB": 0.0}
    ours = build_transform(data_config(DATA__IMG_SIZE=size, **keys), is_train=True)
    timms = timm.data.create_transform(
        size, is_training=True, use_prefetcher=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic"
    )
    for seed in range(10):
        image = picture(seed, (90, 120))
        with seeded_streams(2, seed):
            expected = timms(image)
        with seeded_streams(2, seed):
            pixels = ours(image)
        assert np.array_equal(pixels, np.asarray(expected).transpose(1, 2, 0))


# --- data sets ---


def write_bands(root: Path, channels: int) -> Path:
    """Write train/ and val/ with two classes of images of so many channels: PNG where it has as many, else pages."""
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for number in range(4):
                pixels = bands(channels, seed=10 * label + number)
                if channels == 4:
                    of_mode("RGBA", pixels).save(root / part / name / f"{number}.png")
                else:
                    pages = [Image.fromarray(page) for page in np.moveaxis(pixels, 2, 0)]
                    pages[0].save(root / part / name / f"{number}.tif", save_all=True, append_images=pages[1:])
    return root


@pytest.mark.parametrize("channels", (1, 4, 6))
def test_batches_of_any_channels_and_of_rectangles(tmp_path, channels):
    data = write_splits(tmp_path / "rgb") if channels == 1 else write_bands(tmp_path / "data", channels)
    keys = {"DATA__DATA_PATH": data, "MODEL__STRIP_MLP__IN_CHANS": channels, "DATA__IMG_SIZE": (32, 64), **PLAIN}
    plain = data_config(**keys)
    transform = build_batch_transform(plain, is_train=True, device="cpu")
    for loader in (build_train_loader(plain, device="cpu"), build_val_loader(plain, device="cpu")):
        images, targets, indices = next(iter(loader))
        assert images.shape == (4, channels, 32, 64)
        assert images.dtype == torch.uint8
        finished, _ = transform(images, targets, indices)
        assert finished.shape == images.shape
    for cached in ({"DATA__VAL_CACHE": tmp_path / "cache"}, {"DATA__CACHE_DECODED": "ram"}):
        again = next(iter(build_val_loader(data_config(**keys, **cached), device="cpu")))
        assert torch.equal(again[0], images)


def test_grey_and_colour_have_caches_of_their_own(tmp_path):
    keys = {"DATA__DATA_PATH": write_splits(tmp_path / "rgb"), "DATA__VAL_CACHE": tmp_path / "cache"}
    for channels in (3, 1):
        dataset = build_dataset(data_config(**keys, MODEL__STRIP_MLP__IN_CHANS=channels), is_train=False)
        assert dataset[0][0].shape == (40, 40, channels)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_image_without_the_channels_is_named(tmp_path):
    keys = {"DATA__DATA_PATH": write_splits(tmp_path), "MODEL__STRIP_MLP__IN_CHANS": 4, **PLAIN}
    dataset = build_dataset(data_config(**keys), is_train=False)
    with pytest.raises(ImageReadError, match=r"0.jpg \(index 0, class 'cat'\): JPEG image of 3 channel"):
        dataset[0]


@pytest.mark.parametrize("as_array", (True, False))
def test_images_in_memory_become_grey_or_are_refused(as_array):
    pixels = np.asarray(picture(0))[None]
    source = ArraySource(pixels, [0], ["a"], title="digits", as_array=as_array, channels=1)
    assert np.array_equal(source.load(0), Image.fromarray(pixels[0]).convert("L"))
    with pytest.raises(ValueError, match="IN_CHANS is 4, but the images of digits are RGB; take 3, or 1"):
        ArraySource(pixels, [0], ["a"], title="digits", as_array=as_array, channels=4)


def test_pixels_are_normalised_with_the_configured_values():
    keys = {"MODEL__STRIP_MLP__IN_CHANS": 2, "DATA__MEAN": (0.1, 0.2), "DATA__STD": (0.5, 0.25), **PLAIN}
    transform = build_batch_transform(data_config(**keys), is_train=False, device="cpu")
    images, _ = transform(torch.full((1, 2, 3, 3), 255, dtype=torch.uint8), torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([1.8, 3.2]))
