"""Data: sources of images, transforms, sampling order, loaders and what happens to a batch on the device."""

from .batch_transform import BatchTransform, build_batch_transform
from .build import build_train_loader, build_val_loader
from .checks import check_data
from .datasets import DATASETS, ImageDataset, build_dataset, build_datasets
from .image_io import ImageReadError
from .samplers import EvalShardSampler, TrainSampler

__all__ = [
    "DATASETS",
    "BatchTransform",
    "EvalShardSampler",
    "ImageDataset",
    "ImageReadError",
    "TrainSampler",
    "build_batch_transform",
    "build_dataset",
    "build_datasets",
    "build_train_loader",
    "build_val_loader",
    "check_data",
]
