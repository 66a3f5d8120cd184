"""Loaders of the configuration: ``build_train_loader`` and ``build_val_loader``."""

import torch
from torch.utils.data import Sampler
from yacs.config import CfgNode

from data.dataset import ImageDataset, build_dataset
from data.loading.loader import ImageLoader
from data.loading.samplers import EvalShardSampler, TrainSampler
from utils.runtime import get_rank, get_world_size, integer_seed, usable_cores


def build_train_loader(config: CfgNode, *, device: torch.device | str) -> ImageLoader:
    """Return the training loader of this process.

    It yields (images, targets, indices): images uint8 (B, 3, S, S) in channels-last memory (fast pipeline) or
    normalised float (reference pipeline), int64 labels and sample indices (B,). ``loader.sampler`` is a TrainSampler:
    call its ``set_progress`` before each epoch. Incomplete batches are dropped.
    """
    dataset = build_dataset(config, is_train=True)
    sampler = TrainSampler(
        len(dataset),
        batch_size=config.DATA.BATCH_SIZE,
        seed=config.SEED,
        rank=get_rank(),
        world_size=get_world_size(),
    )
    return _loader(config, dataset, sampler, batch_size=config.DATA.BATCH_SIZE, device=device, drop_last=True)


def build_val_loader(config: CfgNode, *, device: torch.device | str) -> ImageLoader:
    """Return this process's share of the validation set, in order, without padding; batches as in training.

    Does not touch the training set. ``len(loader.dataset)`` counts the whole validation set.
    """
    dataset = build_dataset(config, is_train=False)
    sampler = EvalShardSampler(len(dataset), rank=get_rank(), world_size=get_world_size())
    batch_size = config.TEST.BATCH_SIZE or config.DATA.BATCH_SIZE
    return _loader(config, dataset, sampler, batch_size=batch_size, device=device, drop_last=False)


def _loader(
    config: CfgNode,
    dataset: ImageDataset,
    sampler: Sampler,
    *,
    batch_size: int,
    device: torch.device | str,
    drop_last: bool,
) -> ImageLoader:
    num_workers = usable_cores() if config.DATA.NUM_WORKERS < 0 else config.DATA.NUM_WORKERS
    return ImageLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=config.DATA.PIN_MEMORY and torch.device(device).type == "cuda",
        timeout=config.DATA.LOADER_TIMEOUT if num_workers else 0,
        # a stream of its own: starting workers must not draw from the training's
        generator=torch.Generator().manual_seed(integer_seed(config.SEED, get_rank())),
    )
