"""Loaders: the same batches for any number of workers, an interrupted epoch's tail, caches with the same pixels."""

import errno
import logging
import multiprocessing
import os
import random
import resource
import socket
import time

import numpy as np
import pytest
import torch

from data import build_batch_transform, build_dataset, build_train_loader, build_val_loader
from data.loading.samplers import TrainSampler
from data.sources.base import ArraySource
from data.sources.cached import DecodedSource, FinishedSource
from tests.builders import data_config
from tests.images import write_splits
from utils.errors import ImageReadError
from utils.runtime.processes import once_per_machine, usable_cores

# torch suggests fewer workers than some tests start
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture
def folder(tmp_path):
    return write_splits(tmp_path, train=9, val=5)


def train_batches(loader, *, epoch=0, samples_seen=0):
    loader.sampler.set_progress(epoch, samples_seen)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("pipeline", ("fast", "reference"))
def test_batches_do_not_depend_on_the_number_of_workers(folder, pipeline):
    runs = []
    for workers in (0, 1, 3):
        config = data_config(DATA__DATA_PATH=folder, DATA__NUM_WORKERS=workers, DATA__PIPELINE=pipeline)
        loader = build_train_loader(config, device="cpu")
        val = list(build_val_loader(config, device="cpu"))
        runs.append((train_batches(loader, epoch=1) + train_batches(loader, epoch=2), val))
    for train, val in runs[1:]:
        assert equal(train, runs[0][0])
        assert equal(val, runs[0][1])
    assert not equal(runs[0][0][:6], runs[0][0][6:])


@pytest.mark.parametrize("workers", (0, 2))
def test_interrupted_epoch_gives_the_uninterrupted_tail(folder, workers):
    config = data_config(DATA__DATA_PATH=folder, DATA__NUM_WORKERS=workers)
    whole = train_batches(build_train_loader(config, device="cpu"), epoch=4)
    assert equal(train_batches(build_train_loader(config, device="cpu"), epoch=4, samples_seen=8), whole[2:])


def test_layout_of_the_batches(folder):
    loader = build_train_loader(data_config(DATA__DATA_PATH=folder), device="cpu")
    images, targets, indices = next(iter(loader))
    assert images.shape == (4, 3, 40, 40)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (targets.dtype, indices.dtype) == (torch.int64, torch.int64)
    assert targets.tolist() == loader.dataset.targets[indices].tolist()
    assert isinstance(loader.sampler, TrainSampler)
    assert (len(loader), loader.sampler.batches_per_epoch) == (6, 6)
    assert loader.dataset.classes == ["cat", "dog", "emu"]
    reference = build_train_loader(data_config(DATA__DATA_PATH=folder, DATA__PIPELINE="reference"), device="cpu")
    assert next(iter(reference))[0].dtype == torch.float32


def test_pipelines_meet_after_the_batch_transform(folder):
    results = []
    for pipeline in ("fast", "reference"):
        config = data_config(DATA__DATA_PATH=folder, DATA__PIPELINE=pipeline, AUG__REPROB=0.0)
        loader = build_train_loader(config, device="cpu")
        transform = build_batch_transform(config, is_train=True, device="cpu", rank=0)
        results.append([transform(*batch, epoch=0, update=n) for n, batch in enumerate(train_batches(loader))])
    assert equal(*results)


def test_validation_needs_no_training_set_and_sees_everything_in_order(folder):
    (folder / "train").rename(folder / "elsewhere")
    loader = build_val_loader(data_config(DATA__DATA_PATH=folder, TEST__BATCH_SIZE=6), device="cpu")
    indices = [batch[2].tolist() for batch in loader]
    assert indices == [list(range(0, 6)), list(range(6, 12)), list(range(12, 15))]
    assert len(loader.dataset) == 15


def test_processes_train_on_different_samples(folder, monkeypatch):
    seen = []
    monkeypatch.setattr("data.build.get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("data.build.get_rank", lambda rank=rank: rank)
        loader = build_train_loader(data_config(DATA__DATA_PATH=folder), device="cpu")
        seen += [index for batch in train_batches(loader) for index in batch[2].tolist()]
    assert len(seen) == len(set(seen)) == 24  # of 27, two batches of 4 for each process


def test_time_limit_applies_to_workers_only(folder):
    for workers, timeout in ((0, 0), (1, 7)):
        config = data_config(DATA__DATA_PATH=folder, DATA__NUM_WORKERS=workers, DATA__LOADER_TIMEOUT=7)
        assert build_train_loader(config, device="cpu").timeout == timeout


@pytest.mark.parametrize("world_size", (2, 3, 20))
def test_validation_shards_cover_the_set(folder, monkeypatch, world_size):
    seen = []
    monkeypatch.setattr("data.build.get_world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr("data.build.get_rank", lambda rank=rank: rank)
        loader = build_val_loader(data_config(DATA__DATA_PATH=folder), device="cpu")
        seen += [index for batch in loader for index in batch[2].tolist()]
    assert sorted(seen) == list(range(15))


def test_random_streams_stay_where_they_were(folder, tmp_path):
    def streams():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = streams()
    for workers in (0, 2):
        config = data_config(DATA__DATA_PATH=folder, DATA__NUM_WORKERS=workers)
        train_batches(build_train_loader(config, device="cpu"))
        list(build_val_loader(config, device="cpu"))
    build_val_loader(data_config(DATA__DATA_PATH=folder, DATA__VAL_CACHE=tmp_path / "cache"), device="cpu")
    assert streams() == before


def test_broken_image_in_a_worker_is_named(folder):
    config = data_config(DATA__DATA_PATH=folder, DATA__NUM_WORKERS=2)
    loader = build_train_loader(config, device="cpu")
    index = list(loader.sampler)[9][1]
    open(loader.dataset.sample_name(index), "w").close()
    with pytest.raises(ImageReadError, match=rf"\.jpg \(index {index}, class '\w+'\): the file is empty"):
        train_batches(loader)
    assert multiprocessing.active_children() == [], "an error must not leave workers behind"


def test_skipped_images_of_workers_are_counted(folder):
    batches = []
    for workers in (0, 2):
        config = data_config(DATA__DATA_PATH=folder, DATA__NUM_WORKERS=workers, DATA__BAD_IMAGES="skip")
        loader = build_train_loader(config, device="cpu")
        open(loader.dataset.sample_name(10), "w").close()
        batches.append([batch for epoch in range(3) for batch in train_batches(loader, epoch=epoch)])
        assert loader.dataset.bad_indices() == [10]
        assert 10 not in torch.cat([indices for _, _, indices in batches[-1]])
    assert equal(*batches)


def test_workers_default_to_this_process_share_of_the_cores(folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert usable_cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert (usable_cores(), usable_cores(shared=False)) == (2, 12)
    assert build_val_loader(data_config(DATA__DATA_PATH=folder, DATA__NUM_WORKERS=-1), device="cpu").num_workers == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "50")
    assert usable_cores() == 1


# --- caches ---


@pytest.mark.parametrize("pipeline", ("fast", "reference"))
def test_decoded_cache_has_the_same_pixels(folder, pipeline):
    keys = {"DATA__DATA_PATH": folder, "DATA__PIPELINE": pipeline}
    plain = build_dataset(data_config(**keys), is_train=True)
    cached = build_dataset(data_config(DATA__CACHE_DECODED="ram", **keys), is_train=True)
    assert isinstance(cached.source, DecodedSource)
    for index in (0, 5, 26):
        assert np.array_equal(np.asarray(cached[1, index][0]), np.asarray(plain[1, index][0]))
    assert cached.sample_name(5) == plain.sample_name(5)


def test_decoded_cache_needs_no_files_and_reports_broken_ones(folder):
    with open(folder / "train" / "cat" / "1.jpg", "r+b") as file:
        file.truncate(900)
    (folder / "train" / "cat" / "2.jpg").write_bytes(b"")
    config = data_config(DATA__DATA_PATH=folder, DATA__CACHE_DECODED="ram", DATA__NUM_WORKERS=2)
    loader = build_train_loader(config, device="cpu")
    os.remove(loader.dataset.sample_name(20))
    assert loader.dataset[0, 20][2] == 20
    for index in (1, 2):
        with pytest.raises(ImageReadError, match=f"cat/{index}.jpg"):
            loader.dataset[0, index]


def test_decoded_cache_is_not_used_for_arrays_and_must_fit(folder, monkeypatch):
    digits = build_dataset(data_config(DATA__DATASET="digits", DATA__CACHE_DECODED="ram"), is_train=False)
    assert isinstance(digits.source, ArraySource)
    monkeypatch.setattr("data.loading.shared_memory.free_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="DATA.CACHE_DECODED ram needs 0.00 GB"):
        build_dataset(data_config(DATA__DATA_PATH=folder, DATA__CACHE_DECODED="ram"), is_train=True)


@pytest.fixture
def cached_config(folder, tmp_path):
    return data_config(DATA__DATA_PATH=folder, DATA__VAL_CACHE=tmp_path / "cache" / "deeper", DATA__NUM_WORKERS=2)


def test_validation_cache_has_the_same_batches(folder, cached_config, caplog):
    expected = list(build_val_loader(data_config(DATA__DATA_PATH=folder), device="cpu"))
    with caplog.at_level(logging.INFO):
        loader = build_val_loader(cached_config, device="cpu")
    assert "wrote the validation cache" in caplog.text
    assert isinstance(loader.dataset.source, FinishedSource)
    assert equal(list(loader), expected)
    assert loader.dataset.sample_name(3) == str(folder / "val" / "cat" / "3.jpg")
    assert len(list((folder / "cache" / "deeper").iterdir())) == 1
    caplog.clear()
    assert equal(list(build_val_loader(cached_config, device="cpu")), expected)
    assert not caplog.records, "written a second time"
    training = build_dataset(cached_config, is_train=True)
    assert not isinstance(training.source, FinishedSource)


def test_validation_cache_is_made_anew_when_its_inputs_change(folder, cached_config):
    before = list(build_val_loader(cached_config, device="cpu"))
    other_size = cached_config.clone()
    other_size.defrost()
    other_size.DATA.IMG_SIZE = 48
    assert next(iter(build_val_loader(other_size, device="cpu")))[0].shape[-1] == 48
    (folder / "val" / "cat" / "0.jpg").write_bytes((folder / "val" / "emu" / "0.jpg").read_bytes())
    after = list(build_val_loader(cached_config, device="cpu"))
    assert not torch.equal(after[0][0][0], before[0][0][0])
    assert torch.equal(after[0][0][1:], before[0][0][1:])


def test_validation_cache_is_made_anew_for_another_transform(folder, tmp_path):
    squashed = {"TEST__CROP": False}
    changes = ({}, {"DATA__INTERPOLATION": "bilinear"}, {"DATA__FAST_RESIZE": True}, squashed)
    for number, keys in enumerate((*changes, squashed | {"DATA__IMG_SIZE": 48}), start=1):
        config = data_config(DATA__DATA_PATH=folder, DATA__VAL_CACHE=tmp_path / "cache", **keys)
        plain = build_dataset(data_config(DATA__DATA_PATH=folder, **keys), is_train=False)
        assert np.array_equal(build_dataset(config, is_train=False)[4][0], plain[4][0])
        assert len(list((tmp_path / "cache").iterdir())) == number


@pytest.mark.parametrize("library", ("PIL", "torch"))
def test_validation_cache_is_made_anew_for_another_version_of_the_library(folder, tmp_path, monkeypatch, library):
    keys = {"DATA__DATA_PATH": folder, "DATA__VAL_CACHE": tmp_path / "cache", "DATA__FAST_RESIZE": library == "torch"}
    build_dataset(data_config(**keys), is_train=False)
    monkeypatch.setattr(f"{library}.__version__", "99.9")
    build_dataset(data_config(**keys), is_train=False)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_unfinished_validation_cache_is_never_visible(folder, cached_config):
    (folder / "val" / "dog" / "3.jpg").write_bytes(b"broken")
    with pytest.raises(RuntimeError, match=r"writing the validation cache .* failed: .*dog/3\.jpg"):
        build_val_loader(cached_config, device="cpu")
    assert list((folder / "cache" / "deeper").iterdir()) == []


def test_failure_while_the_validation_cache_is_written_leaves_nothing(folder, cached_config, monkeypatch):
    def fail_after_a_batch(batches, *_, **__):
        yield next(iter(batches))
        raise OSError(28, "No space left on device")

    others = multiprocessing.active_children()
    monkeypatch.setattr("data.sources.cached.tqdm", fail_after_a_batch)
    with pytest.raises(RuntimeError, match="validation cache .* failed: .*No space left") as info:
        build_val_loader(cached_config, device="cpu")
    assert list((folder / "cache" / "deeper").iterdir()) == []
    assert not [child for child in multiprocessing.active_children() if child not in others], str(info.value)


def test_damaged_validation_cache_is_refused(folder, cached_config):
    build_val_loader(cached_config, device="cpu")
    (file,) = (folder / "cache" / "deeper").iterdir()
    os.truncate(file, 1000)
    with pytest.raises(RuntimeError, match=f"{file.name} failed"):
        build_val_loader(cached_config, device="cpu")
    np.save(file, np.zeros((15, 48, 48, 3), np.uint8))
    with pytest.raises(RuntimeError, match="another shape has this name"):
        build_val_loader(cached_config, device="cpu")


def test_full_disk_is_found_before_the_first_image(folder, cached_config, monkeypatch):
    monkeypatch.setattr("data.dataset.ImageDataset.__getitems__", lambda *_: pytest.fail("an image was read"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # the kernel refuses a larger file
    try:
        with pytest.raises(RuntimeError, match="validation cache .* failed: .*File too large"):
            build_val_loader(cached_config, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(RuntimeError, match="No space left on device: 7.21e-05 GB are needed.*DATA.VAL_CACHE"):
        build_val_loader(cached_config, device="cpu")
    assert list((folder / "cache" / "deeper").iterdir()) == []


def test_disk_that_fills_while_the_validation_cache_is_written(folder, cached_config, monkeypatch):
    """As on file systems that cannot reserve room; an access to mapped memory would be a bus error."""

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("os.posix_fallocate", unsupported)
    monkeypatch.setattr("data.build._WRITE_BATCH", 4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # for the memory files of batches, too
    try:
        with pytest.raises(RuntimeError, match="validation cache .* failed: .*File too large"):
            build_val_loader(cached_config, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((folder / "cache" / "deeper").iterdir()) == []
    expected = list(build_val_loader(data_config(DATA__DATA_PATH=folder), device="cpu"))
    assert equal(list(build_val_loader(cached_config, device="cpu")), expected)


def test_unfinished_files_of_dead_writers_are_removed(folder, cached_config):
    cache = folder / "cache" / "deeper"
    cache.mkdir(parents=True)
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    here = socket.gethostname()
    ages = {f"{here}-{ended.pid}": 0, "elsewhere-7": 2 * 86400, f"{here}-{os.getppid()}": 0, "elsewhere-8": 0}
    for name, age in ages.items():
        file = cache / f".val_0.npy.tmp-{name}"
        file.write_bytes(b"x")
        os.utime(file, (time.time() - age,) * 2)
    build_val_loader(cached_config, device="cpu")
    left = sorted(file.name for file in cache.glob(".*"))
    assert left == sorted(f".val_0.npy.tmp-{name}" for name in list(ages)[2:]), "of living ones, or perhaps"


def test_validation_cache_is_filled_batch_by_batch(folder, cached_config, monkeypatch):
    monkeypatch.setattr("data.build._WRITE_BATCH", 4)
    expected = list(build_val_loader(data_config(DATA__DATA_PATH=folder), device="cpu"))
    assert equal(list(build_val_loader(cached_config, device="cpu")), expected)


def test_only_the_first_process_of_a_machine_acts(monkeypatch):
    done = []
    once_per_machine(lambda: done.append(0), what="work")
    monkeypatch.setenv("LOCAL_RANK", "1")
    once_per_machine(lambda: done.append(1), what="work")
    assert done == [0]
    monkeypatch.setattr("utils.runtime.processes.gather_objects", lambda failure: [failure, "work failed: disk full"])
    with pytest.raises(RuntimeError, match="work failed: disk full"):
        once_per_machine(lambda: done.append(1), what="work")
