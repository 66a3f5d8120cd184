"""Data: sources of images, transforms, sampling order, loaders and what happens to a batch on the device."""

from data.build import build_train_loader, build_val_loader
from data.checks import check_data
from data.dataset import DATASETS, ImageDataset, build_dataset, build_datasets
from data.images.batch import BatchTransform, build_batch_transform
from data.images.decode import ImageReadError
from data.loading.samplers import EvalShardSampler, TrainSampler

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
