"""The configuration of a run: keys, files, checks, the published recipe, the command line."""

from utils.config.checks import DATASETS, FOLDER_DATASETS, mixes
from utils.config.cli import parse
from utils.config.loading import (
    config_notices,
    default_config,
    dump_config,
    load_config,
    parse_config,
    recipe_deviations,
    recipe_differences,
    require_known_key,
    run_folder,
)

__all__ = [
    "config_notices",
    "DATASETS",
    "default_config",
    "dump_config",
    "FOLDER_DATASETS",
    "load_config",
    "mixes",
    "parse",
    "parse_config",
    "recipe_deviations",
    "recipe_differences",
    "require_known_key",
    "run_folder",
]
