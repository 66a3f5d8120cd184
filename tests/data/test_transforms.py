"""Transforms: the fast pipeline has the published pixels, timm's Posterize survives 0 bits."""

import numpy as np
import pytest
import timm.data.auto_augment
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import RandomCrop, RandomHorizontalFlip

from data.images.posterize import posterize
from data.images.resize import EvalResize, PaddedCrop, RandomMirror, pil_resize, torch_resize
from data.images.transforms import build_transform
from tests.builders import data_config
from tests.images import SIZES, picture
from utils.errors import ImageReadError
from utils.runtime.random_state import seeded_streams


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """What ToTensor and Normalize make of uint8 (H, W, 3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float().div(255).sub(mean).div(std)


def both(is_train: bool, **keys):
    return [
        build_transform(data_config(AUG__REPROB=0.0, DATA__PIPELINE=p, **keys), is_train=is_train)
        for p in ("reference", "fast")
    ]


@pytest.mark.parametrize("size", (32, 40, 224))
@pytest.mark.parametrize("as_array", (True, False))
def test_fast_training_pixels_equal_the_reference(size, as_array):
    reference, fast = both(True, DATA__IMG_SIZE=size)
    for seed in range(24):
        image = picture(seed, SIZES[seed % len(SIZES)])
        with seeded_streams(1, seed):
            expected = reference(image)
            state = torch.rand(()), np.random.rand()
        with seeded_streams(1, seed):
            pixels = fast(np.asarray(image) if as_array else image)
            assert state == (torch.rand(()), np.random.rand()), "the pipelines draw different numbers"
        assert pixels.dtype == np.uint8
        assert pixels.shape == (size, size, 3)
        assert torch.equal(normalised(pixels), expected)


@pytest.mark.parametrize("size", (32, 224))
def test_training_without_operations_of_pillow_equals_the_reference(size):
    """Nothing then needs a PIL image."""
    keys = {"AUG__AUTO_AUGMENT": "none", "AUG__COLOR_JITTER": 0.0, "DATA__IMG_SIZE": size}
    reference, fast = both(True, **keys)
    for seed in range(8):
        image = picture(seed, (32, 32))
        with seeded_streams(seed):
            expected = reference(image)
            state = torch.rand(())
        with seeded_streams(seed):
            pixels = fast(np.asarray(image))
            assert state == torch.rand(()), "the pipelines draw different numbers"
        assert pixels.flags.c_contiguous
        assert torch.equal(normalised(pixels), expected)


@pytest.mark.parametrize("size", ((32, 32), (20, 28)))
@pytest.mark.parametrize("channels", (1, 3, 5))
def test_crops_and_mirrors_of_arrays_are_those_of_torchvision(size, channels):
    ours = (PaddedCrop(size, padding=4), RandomMirror(0.7))
    theirs = (RandomCrop(size, padding=4), RandomHorizontalFlip(0.7))
    pixels = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    pixels.flags.writeable = False
    for seed in range(20):
        found, expected = pixels, torch.tensor(pixels).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
        with seeded_streams(seed):
            for stage in ours:
                found = stage(found)
            state = torch.rand(())
        with seeded_streams(seed):
            for stage in theirs:
                expected = stage(expected)
            assert state == torch.rand(())
        assert np.array_equal(found, expected.permute(1, 2, 0))


@pytest.mark.parametrize(
    "keys",
    (
        {"DATA__IMG_SIZE": 32},
        {"DATA__IMG_SIZE": 40},
        {"DATA__IMG_SIZE": 224},
        {"DATA__IMG_SIZE": 96, "TEST__CROP": False},
        {"DATA__IMG_SIZE": 64, "DATA__INTERPOLATION": "bilinear"},
        {"DATA__IMG_SIZE": 64, "DATA__INTERPOLATION": "lanczos"},
    ),
)
def test_fast_evaluation_pixels_equal_the_reference(keys):
    reference, fast = both(False, **keys)
    for number, size in enumerate((*SIZES, (300, 224), (256, 256), (7, 5), (257, 391), (32, 32))):
        image = picture(number, size)
        assert torch.equal(normalised(fast(np.asarray(image))), reference(image))
        assert torch.equal(normalised(fast(image)), reference(image))


def test_evaluation_scales_the_shorter_side_to_256_of_224():
    assert build_transform(data_config(DATA__IMG_SIZE=224), is_train=False).short_side == 256
    assert build_transform(data_config(DATA__IMG_SIZE=160), is_train=False).short_side == 182


def test_small_images_are_not_scaled():
    pixels = np.asarray(picture(0, (32, 32)))
    transform = build_transform(data_config(DATA__IMG_SIZE=32), is_train=False)
    assert np.array_equal(transform(pixels), pixels)
    plain = data_config(DATA__IMG_SIZE=32, AUG__AUTO_AUGMENT="none", AUG__COLOR_JITTER=0.0, AUG__HFLIP=0.0)
    transform = build_transform(plain, is_train=True)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    with seeded_streams(0):
        offsets = {windows[transform(pixels).tobytes()] for _ in range(100)}
    assert {y for y, _ in offsets} == {x for _, x in offsets} == set(range(9)), "not a crop of the image padded by 4"


def test_reference_erases_random_boxes():
    config = data_config(DATA__PIPELINE="reference", AUG__REPROB=1.0, AUG__AUTO_AUGMENT="none", DATA__IMG_SIZE=48)
    image = Image.new("RGB", (48, 48), (10, 10, 10))
    with seeded_streams(0):
        channels = build_transform(config, is_train=True)(image).flatten(1)
    assert (channels.std(1) > 0.1).all(), "each channel of the image was constant"


@pytest.mark.parametrize("pipeline", ("reference", "fast"))
@pytest.mark.parametrize("policy", ("rand-m5-mstd0.5", "none"))
def test_every_key_of_the_configuration_reaches_timm(pipeline, policy):
    """Training gets what ``create_transform`` makes of the values, which are all other than the default ones."""
    aug = {"SCALE": (0.3, 0.6), "RATIO": (0.5, 0.9), "HFLIP": 0.9, "COLOR_JITTER": 0.2, "AUTO_AUGMENT": policy}
    erasing = {"REPROB": 0.8, "REMODE": "rand", "RECOUNT": 3} if pipeline == "reference" else {"REPROB": 0.0}
    keys = {f"AUG__{key}": value for key, value in (aug | erasing).items()}
    config = data_config(DATA__PIPELINE=pipeline, DATA__INTERPOLATION="nearest", DATA__IMG_SIZE=64, **keys)
    ours = build_transform(config, is_train=True)
    timms = timm.data.create_transform(
        64,
        is_training=True,
        scale=(0.3, 0.6),
        ratio=(0.5, 0.9),
        hflip=0.9,
        color_jitter=0.2,
        auto_augment=None if policy == "none" else policy,
        interpolation="nearest",
        re_prob=0.8 if pipeline == "reference" else 0.0,
        re_mode="rand",
        re_count=3,
    )
    for seed in range(12):
        image = picture(seed, (90, 120))
        with seeded_streams(2, seed):
            expected = timms(image)
        with seeded_streams(2, seed):
            pixels = ours(image)
        assert torch.equal(pixels if pipeline == "reference" else normalised(pixels), expected)


# --- Posterize with 0 bits, where Pillow 13 raises ---


@pytest.mark.parametrize("pipeline", ("fast", "reference"))
def test_training_survives_posterize_with_zero_bits(pipeline):
    config = data_config(DATA__PIPELINE=pipeline, AUG__AUTO_AUGMENT="rand-m10-n8-inc1-p1.0", AUG__REPROB=0.0)
    transform = build_transform(config, is_train=True)
    image, black = picture(0), 0
    for seed in range(40):
        with seeded_streams(seed):
            pixels = np.asarray(transform(image))
        channels = pixels.reshape(3, -1) if pipeline == "reference" else pixels.reshape(-1, 3).T
        black += float(np.ptp(channels, axis=1).max()) < 1e-3  # flat in each channel
    assert black > 0, "no draw kept 0 bits: the case is not tested"


@pytest.mark.parametrize("policy", ("v0", "original", "augmix-m10", "rand-m9-mstd0.5-inc1", "3a"))
def test_every_posterize_of_a_policy_is_replaced(policy):
    transform = build_transform(data_config(AUG__AUTO_AUGMENT=policy), is_train=True)
    found = [op for op in operations(transform) if op.name.startswith("Posterize")]
    assert found or policy == "3a"
    assert all(op.aug_fn is posterize for op in found)


def operations(node):
    if isinstance(node, timm.data.auto_augment.AugmentOp):
        yield node
    elif isinstance(node, list):
        for part in node:
            yield from operations(part)
    else:
        for value in getattr(node, "__dict__", {}).values():
            if isinstance(value, list):
                yield from operations(value)


def test_posterize_keeps_bits():
    image = picture(3)
    assert not np.asarray(posterize(image, 0)).any()
    assert np.array_equal(np.asarray(posterize(image, 3)), np.asarray(image) & 0xE0)
    assert posterize(image, 8) is image


def test_building_a_transform_leaves_timm_alone():
    before = dict(timm.data.auto_augment.NAME_TO_OP)
    build_transform(data_config(), is_train=True)
    assert before == timm.data.auto_augment.NAME_TO_OP


# --- options ---


@pytest.mark.parametrize("is_train", (True, False))
def test_fast_resize_stays_within_rounding(is_train):
    keys = {"DATA__IMG_SIZE": 64, "AUG__AUTO_AUGMENT": "none", "AUG__COLOR_JITTER": 0.0}
    exact = build_transform(data_config(**keys), is_train=is_train)
    fast = build_transform(data_config(DATA__FAST_RESIZE=True, **keys), is_train=is_train)
    differ = 0
    for seed in range(10):
        pixels = np.asarray(picture(seed, (300, 200)))
        with seeded_streams(seed):
            expected = exact(pixels).astype(int)
        with seeded_streams(seed):
            difference = np.abs(fast(pixels).astype(int) - expected)
        assert difference.max() <= 2
        assert difference.mean() < 0.02
        differ += bool(difference.any())
    assert differ, "the pixels are Pillow's"


@pytest.mark.parametrize("interpolation", ("bicubic", "bilinear"))
def test_torch_resize_takes_rows_and_columns_in_the_order_of_pillow(interpolation):
    """The other order gives values that differ by 20 and more."""
    draw = np.random.default_rng(0)
    for _ in range(40):
        height, width, *target = (int(side) for side in draw.integers(20, 300, 4))
        noise = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = np.asarray(pil_resize(noise, tuple(target), interpolation)).astype(int)
        assert np.abs(torch_resize(noise, tuple(target), interpolation) - expected).max() <= 2


def test_torch_resize_returns_pixels_in_one_piece():
    """Planes of colours would have to be interleaved again, which takes longer than to resize."""
    pixels = np.asarray(picture(0, (300, 200)))
    for box in (pixels, pixels[10:190, 20:250], pixels[:, :90]):
        assert torch_resize(box, (64, 64), "bicubic").flags.c_contiguous


def test_elongated_image_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    transform = EvalResize(224, crop=True, interpolation="bicubic", resize=pil_resize)
    with pytest.raises(ImageReadError, match="400 x 4 pixels: too elongated"):
        transform(np.zeros((4, 400, 3), np.uint8))


def test_colour_jitter_is_used_without_a_policy():
    config = data_config(AUG__AUTO_AUGMENT="none", AUG__HFLIP=0.0, AUG__SCALE=(1.0, 1.0), AUG__RATIO=(1.0, 1.0))
    image = Image.new("RGB", (40, 40), (90, 120, 150))
    with seeded_streams(5):
        assert not np.array_equal(build_transform(config, is_train=True)(image), np.asarray(image))
