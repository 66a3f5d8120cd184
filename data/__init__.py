"""Data: sources of images, transforms, sampling order, loaders and what happens to a batch on the device."""

from data.build import build_dataset, build_train_loader, build_val_loader
from data.checks import check_data, data_facts, describe_classes
from data.dataset import ImageDataset
from data.images.batch import build_batch_transform
from data.images.decode import convert_image, decode_image, jpeg_complaint
from data.images.transforms import build_transform, check_transform
from data.loading.collate import collate
from data.loading.loader import ImageLoader
from data.sources.base import FileSource, FolderSource
from data.sources.holdout import HeldOut, held_out_images
from data.sources.listing import class_folders, expanded_path, list_images, read_image_file
from data.sources.ranges import is_address
from data.sources.shards import INDEX, SAMPLES, Shard, ShardSource, is_shard_set, part_of, write_index

__all__ = [
    "FileSource",
    "FolderSource",
    "HeldOut",
    "INDEX",
    "SAMPLES",
    "Shard",
    "ShardSource",
    "ImageDataset",
    "ImageLoader",
    "build_batch_transform",
    "build_dataset",
    "build_train_loader",
    "build_transform",
    "build_val_loader",
    "check_data",
    "check_transform",
    "class_folders",
    "collate",
    "convert_image",
    "data_facts",
    "decode_image",
    "describe_classes",
    "expanded_path",
    "held_out_images",
    "is_address",
    "is_shard_set",
    "jpeg_complaint",
    "list_images",
    "part_of",
    "read_image_file",
    "write_index",
]
