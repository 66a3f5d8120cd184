"""Data: sources of images, transforms, sampling order, loaders and what happens to a batch on the device."""

from data.build import build_dataset, build_train_loader, build_val_loader
from data.checks import check_data
from data.dataset import ImageDataset
from data.images.batch import build_batch_transform
from data.images.decode import decode_image, jpeg_complaint, to_rgb
from data.images.transforms import build_transform, check_transform
from data.loading.collate import collate
from data.sources.listing import expanded_path, list_images, read_image_file

__all__ = [
    "ImageDataset",
    "build_batch_transform",
    "build_dataset",
    "build_train_loader",
    "build_transform",
    "build_val_loader",
    "check_data",
    "check_transform",
    "collate",
    "decode_image",
    "expanded_path",
    "jpeg_complaint",
    "list_images",
    "read_image_file",
    "to_rgb",
]
