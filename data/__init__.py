"""Data: sources of images, transforms, sampling order, loaders and what happens to a batch on the device."""

from data.build import build_train_loader, build_val_loader
from data.checks import check_data
from data.dataset import DATASETS, ImageDataset, build_dataset, build_datasets
from data.images.batch import BatchTransform, build_batch_transform
from data.images.decode import decode_image, jpeg_complaint
from data.loading.collate import collate
from data.loading.samplers import EvalShardSampler, TrainSampler
from utils.errors import ImageReadError

__all__ = [
    "BatchTransform",
    "build_batch_transform",
    "build_dataset",
    "build_datasets",
    "build_train_loader",
    "build_val_loader",
    "check_data",
    "collate",
    "DATASETS",
    "decode_image",
    "EvalShardSampler",
    "ImageDataset",
    "ImageReadError",
    "jpeg_complaint",
    "TrainSampler",
]
