"""Order of the samples: depends on seed and epoch, is shared without overlap, and resumes anywhere."""

import numpy as np
import pytest

from data.loading.samplers import EvalShardSampler, TrainSampler

SIZE = 103


def shares(world_size, *, batch_size=4, seed=7, epoch=0, seen=0, num_samples=SIZE, **options):
    """The indices that each rank gets."""
    result = []
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        sampler = TrainSampler(num_samples, batch_size=batch_size, seed=seed, **place, **options)
        sampler.set_progress(epoch, seen)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        assert all(e == epoch for e, _ in keys)
        result.append([index for _, index in keys])
    return result


def global_order(ranks, batch_size=4):
    """The samples in the order in which all ranks together use them, one set for each global batch."""
    return [
        {i for share in ranks for i in share[start : start + batch_size]}
        for start in range(0, len(ranks[0]), batch_size)
    ]


@pytest.mark.parametrize("world_size", (1, 2, 3))
def test_ranks_share_whole_global_batches_without_overlap(world_size):
    ranks = shares(world_size)
    used = [index for share in ranks for index in share]
    assert len(used) == len(set(used)) == SIZE // (4 * world_size) * 4 * world_size
    assert len({len(share) for share in ranks}) == 1
    assert TrainSampler(SIZE, batch_size=4, seed=7, world_size=world_size).batches_per_epoch == len(ranks[0]) // 4


def test_order_depends_on_seed_and_epoch_only():
    assert shares(1) == shares(1)
    assert shares(1) != shares(1, epoch=1)
    assert shares(1) != shares(1, seed=8)
    assert global_order(shares(2)) == global_order(shares(1, batch_size=8), 8)


@pytest.mark.parametrize("world_size", (1, 2, 3))
@pytest.mark.parametrize("batches", (0, 1, 5))
def test_interrupted_epoch_continues_with_the_rest(world_size, batches):
    whole = shares(world_size, epoch=3)
    rest = shares(world_size, epoch=3, seen=batches * 4 * world_size)
    assert rest == [share[batches * 4 :] for share in whole]


def test_resume_with_other_processes_and_batch_uses_each_sample_once():
    first = [index for share in shares(2, num_samples=96) for index in share[:12]]  # 3 batches of 2 x 4
    for world_size, batch_size in ((1, 4), (3, 8), (4, 2)):
        rest = shares(world_size, batch_size=batch_size, seen=24, num_samples=96)
        assert sorted([*first, *(index for share in rest for index in share)]) == list(range(96))


def test_nothing_is_left_at_the_end():
    assert shares(2, seen=96) == [[], []]


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="rank=2"):
        TrainSampler(10, batch_size=2, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="num_samples=0"):
        TrainSampler(0, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="11 samples seen of 10"):
        TrainSampler(10, batch_size=2, seed=0).set_progress(0, 11)
    with pytest.raises(ValueError, match="rank 1"):
        EvalShardSampler(10, rank=1, world_size=1)


@pytest.mark.parametrize("world_size", (1, 2, 3))
@pytest.mark.parametrize("num_samples", (1, 3, 11, 12))
def test_evaluation_shards_cover_each_sample_once(world_size, num_samples):
    parts = [EvalShardSampler(num_samples, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(index for part in parts for index in part) == list(range(num_samples))
    assert [len(list(part)) for part in parts] == [len(part) for part in parts]


LABELS = np.repeat([0, 1, 2], (70, 25, SIZE - 95))


def balanced(world_size, **options):
    return shares(world_size, balance=LABELS, **options)


def test_balanced_epochs_have_as_many_samples_of_each_class():
    order = np.array(balanced(1, batch_size=1)[0])
    counts = np.bincount(LABELS[order % SIZE])
    assert len(order) == len(set(order.tolist())) == SIZE
    assert counts.sum() == SIZE
    assert counts.max() - counts.min() <= 1
    images = np.bincount(order % SIZE, minlength=SIZE)
    for label in range(3):
        used = images[label == LABELS]
        assert used.max() - used.min() <= 1
    assert sorted(order[order % SIZE == SIZE - 1] // SIZE) == list(range(images[-1]))  # each time another sample


def test_balanced_order_is_resumed_and_shared_exactly():
    whole = balanced(1)[0]
    assert balanced(1, seen=8)[0] == whole[8:]
    assert balanced(1, epoch=1)[0] != whole
    assert global_order(balanced(2)) == global_order(balanced(1, batch_size=8), 8)


def repeated(world_size, *, seen=0, size=12, repeats=3, batch_size=2):
    """The samples that each rank gets under repeated augmentation, as (image, repetition)."""
    result = []
    for rank in range(world_size):
        sampler = TrainSampler(size, batch_size=batch_size, seed=7, rank=rank, world_size=world_size, repeats=repeats)
        sampler.set_progress(1, seen)
        assert len(list(sampler)) == len(sampler)
        result.append([(index % size, index // size) for _, index in sampler])
    return result


def test_repeated_augmentation_shows_a_third_of_the_images_three_times():
    """As timm's RepeatAugSampler, for the samples of all ranks together."""
    (alone,) = repeated(1)
    images = [image for image, _ in alone]
    assert len(alone) == len(set(alone)) == 12
    assert images[::3] == images[1::3] == images[2::3]
    assert len(set(images)) == 4
    assert [number for _, number in alone] == 4 * [0, 1, 2]
    first, second = repeated(2)
    assert [sample for pair in zip(first, second, strict=True) for sample in pair] == alone  # copies go to other ranks


def test_repeated_augmentation_resumes_anywhere():
    (whole,) = repeated(1)
    assert repeated(1, seen=4) == [whole[4:]]
    rest = repeated(2, seen=4)
    assert sorted([*whole[:4], *rest[0], *rest[1]]) == sorted(whole)
