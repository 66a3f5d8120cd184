"""Whole batches: normalisation to the last bit, erasing by sample, timm's mixup under its own seed."""

import random

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing as TimmErasing

from data import build_batch_transform
from data.images.erasing import RandomErasing, sample_keys, uniform_numbers
from tests.builders import data_config
from tests.data.test_transforms import normalised
from utils.runtime.random_state import integer_seed, seeded_streams

PLAIN = {"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0, "AUG__REPROB": 0.0}


def batch(count=8, size=40, first=0):
    """A batch as the loader of the fast pipeline makes it."""
    pixels = torch.from_numpy(np.random.default_rng(first).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    return pixels.permute(0, 3, 1, 2), torch.arange(count) % 3, torch.arange(first, first + count)


def transform(is_train=True, rank=0, **keys):
    return build_batch_transform(data_config(**keys), is_train=is_train, device="cpu", rank=rank)


@pytest.mark.parametrize("is_train", (True, False))
def test_normalisation_is_that_of_the_published_transform(is_train):
    images, targets, indices = batch()
    result, labels = transform(is_train, **(PLAIN if is_train else {}))(images, targets, indices, epoch=0, update=0)
    expected = torch.stack([normalised(image.permute(1, 2, 0).numpy()) for image in images])
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, targets)
    assert images.dtype == torch.uint8, "the loader's batch must stay as it is"


def test_float_batches_come_finished_from_the_reference_pipeline():
    images = torch.randn(4, 3, 40, 40)
    keys = PLAIN | {"AUG__REPROB": 1.0}
    result, _ = transform(**keys)(images, torch.zeros(4, dtype=torch.int64), torch.arange(4), epoch=0, update=0)
    assert torch.equal(result, images)


def test_global_random_streams_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    transform(AUG__REPROB=1.0)(*batch(), epoch=1, update=2)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


# --- mixup ---


@pytest.mark.parametrize("minmax", (None, (0.2, 0.8)))
@pytest.mark.parametrize("mode", ("batch", "pair", "elem"))
def test_mixup_is_timms(mode, minmax):
    images, targets, indices = batch()
    plain = transform(**PLAIN)(images, targets, indices)[0]
    keys = {"AUG__MIXUP_MODE": mode, "AUG__CUTMIX_MINMAX": minmax, "AUG__MIXUP": 0.3, "AUG__CUTMIX": 0.7}
    keys |= {"AUG__MIXUP_PROB": 0.9, "AUG__MIXUP_SWITCH_PROB": 0.4, "AUG__REPROB": 0.0}
    config = data_config(**keys)
    ours = transform(rank=1, **keys)
    aug = config.AUG
    reference = Mixup(
        aug.MIXUP,
        aug.CUTMIX,
        aug.CUTMIX_MINMAX,
        aug.MIXUP_PROB,
        aug.MIXUP_SWITCH_PROB,
        mode,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=3,
    )
    for update in range(8):
        mixed, soft = ours(images, targets, indices, epoch=2, update=update)
        with seeded_streams(config.SEED, 1, 2, update, 0):
            expected, expected_soft = reference(plain.clone(), targets)
        assert torch.equal(mixed, expected)
        assert torch.equal(soft, expected_soft)
        assert soft.shape == (8, 3)
        assert torch.allclose(soft.sum(1), torch.ones(8))


def test_mixing_depends_on_seed_rank_and_update():
    def mixed(update=0, rank=0, epoch=0, indices=range(8), **keys):
        images, targets, _ = batch()
        indices = torch.tensor(indices)
        images, targets = transform(rank=rank, **keys)(images, targets, indices, epoch=epoch, update=update)
        return images.sum().item(), targets[0, 0].item()

    base = mixed()
    assert base == mixed()
    others = [mixed(update=1), mixed(rank=1), mixed(epoch=1), mixed(SEED=1), mixed(indices=range(8, 16))]
    assert len({base, *others}) == 6


def test_mixes_tells_what_targets_are():
    assert transform().mixes
    assert transform(AUG__MIXUP=0.0).mixes, "cutmix alone mixes targets too"
    assert transform(AUG__MIXUP=0.0, AUG__CUTMIX=0.0, AUG__CUTMIX_MINMAX=(0.2, 0.8)).mixes
    assert not transform(**PLAIN).mixes
    assert not transform(is_train=False).mixes
    images, targets, indices = batch()
    assert transform(AUG__MIXUP=0.0)(images, targets, indices)[1].shape == (8, 3)


# --- erasing ---


def erased(erasing, indices, epoch=0, size=32):
    """Erase constant images; return the changed values as a mask (B, size, size)."""
    images = torch.full((len(indices), 3, size, size), 7.0)
    erasing(images, torch.as_tensor(indices), epoch=epoch)
    return images, (images != 7).all(1)


def test_erasing_of_a_sample_does_not_depend_on_its_batch():
    erasing = RandomErasing(0.5, seed=3)
    whole, _ = erased(erasing, range(40))
    for start, stop in ((0, 10), (10, 11), (11, 40)):
        part, _ = erased(erasing, range(start, stop))
        assert torch.equal(part, whole[start:stop])
    assert not torch.equal(erased(erasing, range(40), epoch=1)[0], whole)
    assert not torch.equal(erased(RandomErasing(0.5, seed=4), range(40))[0], whole)


def statistics(masks):
    """Share of erased images; of those, mean area and spread of the log aspect ratio of what encloses their boxes, and
    the share whose boxes fill that."""
    hit = masks.flatten(1).any(1)
    boxes = masks[hit].float()
    heights, widths = boxes.amax(2).sum(1), boxes.amax(1).sum(1)
    full = (boxes.sum((1, 2)) == heights * widths).float().mean().item()
    return hit.float().mean().item(), (heights * widths).mean().item(), (heights / widths).log().std().item(), full


@pytest.mark.parametrize("count", (1, 2))
def test_erasing_has_timms_distribution(count):
    ours = statistics(erased(RandomErasing(0.25, max_count=count, seed=0), range(6000))[1])
    with seeded_streams(0):
        images = torch.full((6000, 3, 32, 32), 7.0)
        theirs = statistics((TimmErasing(0.25, mode="pixel", max_count=count, device="cpu")(images) != 7).all(1))
    assert ours[0] == pytest.approx(0.25, abs=0.02)
    assert ours == pytest.approx(theirs, rel=0.1)
    assert ours[1:] == pytest.approx(theirs[1:], rel=0.05)


def test_content_of_a_box():
    images, mask = erased(RandomErasing(1.0, mode="pixel"), range(200))
    values = images.permute(0, 2, 3, 1)[mask]
    assert values.mean().item() == pytest.approx(0, abs=0.02)
    assert values.std().item() == pytest.approx(1, abs=0.02)
    images, mask = erased(RandomErasing(1.0, mode="const"), range(4))
    assert not images.permute(0, 2, 3, 1)[mask].any()
    images, mask = erased(RandomErasing(1.0, mode="rand"), range(4))
    for image, box in zip(images, mask, strict=True):
        assert all(len(channel[box].unique()) == 1 for channel in image)


def test_boxes_lie_anywhere_in_the_image():
    _, masks = erased(RandomErasing(1.0), range(3000), size=12)
    for axis in (1, 2):  # columns, rows
        lines = masks.any(axis).float().mean(0)
        assert lines.min() > 0.05, "some rows or columns are never erased"
        assert lines[0].item() == pytest.approx(lines[-1].item(), rel=0.2)


def test_several_boxes_share_the_area():
    one, many = (statistics(erased(RandomErasing(1.0, max_count=count), range(800))[1])[1] for count in (1, 5))
    covered = erased(RandomErasing(1.0, max_count=5), range(800))[1].float().mean()
    assert many > one, "five boxes spread wider than one"
    assert covered.item() == pytest.approx(0.16, abs=0.04)


def test_counter_based_numbers_are_uniform_and_independent():
    draws = uniform_numbers(sample_keys(integer_seed(1, 2), np.arange(4000)), 8)
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = np.histogram(draws, 20, (0, 1))[0] / draws.size * 20
    assert np.abs(histogram - 1).max() < 0.06
    assert np.abs(np.corrcoef(draws, rowvar=False) - np.eye(8)).max() < 0.06
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.05, "neighbouring samples must not be alike"


def test_erasing_in_the_transform_uses_epoch_and_index():
    keys = PLAIN | {"AUG__REPROB": 1.0}
    images, targets, indices = batch()
    first = transform(**keys)(images, targets, indices, epoch=0)[0]
    assert torch.equal(transform(**keys, rank=3)(images, targets, indices, epoch=0, update=9)[0], first)
    assert not torch.equal(transform(**keys)(images, targets, indices, epoch=1)[0], first)
    assert not transform(False, AUG__REPROB=1.0)(images, targets, indices)[0].equal(first)
