"""The configuration of a run: keys, files, checks, the published recipe, the command line."""

from utils.config.cli import parse
from utils.config.dumping import dump_config
from utils.config.facts import (
    CIFAR_DATASETS,
    CROP_RATIO,
    DATASETS,
    FOLDER_DATASETS,
    SMALL,
    as_pair,
    input_shape,
    mixes,
    normalisation,
    odd_batch_problem,
    short_side,
)
from utils.config.keys import default_config, require_known_key
from utils.config.loading import load_config, parse_config, run_folder
from utils.config.recipe import config_notices, recipe_deviations, recipe_differences
from utils.config.values import expand_path

__all__ = [
    "CIFAR_DATASETS",
    "CROP_RATIO",
    "DATASETS",
    "FOLDER_DATASETS",
    "SMALL",
    "as_pair",
    "config_notices",
    "default_config",
    "dump_config",
    "expand_path",
    "input_shape",
    "load_config",
    "mixes",
    "normalisation",
    "odd_batch_problem",
    "parse",
    "parse_config",
    "recipe_deviations",
    "recipe_differences",
    "require_known_key",
    "run_folder",
    "short_side",
]
