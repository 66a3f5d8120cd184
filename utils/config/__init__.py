"""The configuration of a run: keys, files, checks, the published recipe, the command line."""

from utils.config.cli import parse
from utils.config.dumping import dump_config
from utils.config.facts import (
    CIFAR_DATASETS,
    CROP_RATIO,
    DATASETS,
    FOLDER_DATASETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SMALL,
    as_pair,
    input_shape,
    mixes,
    normalisation,
    odd_batch_problem,
    short_side,
    trains,
)
from utils.config.keys import default_config, require_known_key
from utils.config.loading import load_config, load_stored_config, parse_config, run_folder
from utils.config.recipe import (
    config_differences,
    config_notices,
    recipe_deviations,
    recipe_differences,
    short_of_updates,
)
from utils.config.values import expand_path, read_arguments

__all__ = [
    "CROP_RATIO",
    "CIFAR_DATASETS",
    "DATASETS",
    "FOLDER_DATASETS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SMALL",
    "as_pair",
    "config_differences",
    "config_notices",
    "default_config",
    "dump_config",
    "expand_path",
    "input_shape",
    "load_config",
    "load_stored_config",
    "mixes",
    "normalisation",
    "odd_batch_problem",
    "parse",
    "parse_config",
    "read_arguments",
    "recipe_deviations",
    "recipe_differences",
    "require_known_key",
    "run_folder",
    "short_of_updates",
    "short_side",
    "trains",
]
