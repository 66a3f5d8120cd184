"""Data: sources of images, transforms, sampling order, loaders and what happens to a batch on the device."""

from data.build import build_dataset, build_train_loader, build_val_loader
from data.checks import check_data, data_facts, describe_classes
from data.dataset import ImageDataset
from data.images.batch import build_batch_transform
from data.images.decode import convert_image, decode_image, jpeg_complaint
from data.images.transforms import build_transform, check_transform
from data.loading.collate import collate
from data.loading.loader import ImageLoader
from data.sources.holdout import HeldOut, held_out_images
from data.sources.listing import expanded_path, list_images, read_image_file

__all__ = [
    "HeldOut",
    "ImageDataset",
    "ImageLoader",
    "build_batch_transform",
    "build_dataset",
    "build_train_loader",
    "build_transform",
    "build_val_loader",
    "check_data",
    "check_transform",
    "collate",
    "convert_image",
    "data_facts",
    "decode_image",
    "describe_classes",
    "expanded_path",
    "held_out_images",
    "jpeg_complaint",
    "list_images",
    "read_image_file",
]
