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
from utils.config.keys import KEYS, default_config, flatten, require_known_key, value_of, with_values
from utils.config.loading import ConfigError, load_config, load_stored_config, parse_config, run_folder
from utils.config.recipe import (
    config_differences,
    config_notices,
    recipe_deviations,
    recipe_differences,
    short_of_updates,
)
from utils.config.values import expand_path, read_arguments, read_duration

__all__ = [
    "CROP_RATIO",
    "CIFAR_DATASETS",
    "DATASETS",
    "FOLDER_DATASETS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "KEYS",
    "SMALL",
    "as_pair",
    "config_differences",
    "ConfigError",
    "config_notices",
    "default_config",
    "dump_config",
    "expand_path",
    "flatten",
    "input_shape",
    "load_config",
    "load_stored_config",
    "mixes",
    "normalisation",
    "odd_batch_problem",
    "parse",
    "parse_config",
    "read_arguments",
    "read_duration",
    "recipe_deviations",
    "recipe_differences",
    "require_known_key",
    "run_folder",
    "short_of_updates",
    "short_side",
    "trains",
    "value_of",
    "with_values",
]
