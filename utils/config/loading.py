"""Configuration of a run: read, merged, checked as a whole, and frozen.

Order of precedence, lowest first: the defaults, the config's bases, the config file, ``--opts``, the flags of the
command line. Nothing changes a configuration after ``load_config``; what is known only at run time (number of
processes, scaled learning rate) lives elsewhere. A configuration is data: no file that it names is ever executed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from utils.config.checks import CHOICES, check_config
from utils.config.defaults import default_config, flatten, sections, set_key
from utils.config.files import Layer, read_layers, text_layer
from utils.config.recipe import config_notices, recipe_deviations, recipe_differences
from utils.config.values import convert, nearest

__all__ = [
    "config_notices",
    "default_config",
    "dump_config",
    "load_config",
    "parse_config",
    "recipe_deviations",
    "recipe_differences",
    "require_known_key",
    "run_folder",
]

COMMAND_LINE = "the command line"
AMP_OF_OPT_LEVEL = {"O0": "off", "O1": "fp16", "O2": "fp16"}

# Keys that older versions of such configs hold, and where their value comes from now.
RETIRED_KEYS = {
    "LOCAL_RANK": "the launcher sets it through the environment variable LOCAL_RANK",
    "TRAIN.START_EPOCH": "it follows from the checkpoint given with --resume",
}


class _Dumper(yaml.SafeDumper):
    """Safe dumper that writes lists on one line."""

    def represent_sequence(self, tag: str, sequence: Sequence[Any], flow_style: bool | None = None) -> yaml.Node:
        """Represent a list as ``[a, b]``."""
        return super().represent_sequence(tag, sequence, flow_style=True)


def load_config(cfg_file: str | Path, opts: Sequence[str] = (), overrides: Mapping[str, Any] | None = None) -> CfgNode:
    """Read a config file with its bases, apply what the command line says, check everything, and freeze it.

    Args:
        cfg_file: path of a ``.yaml`` or ``.yml`` file.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]``, or entries ``KEY=VALUE``, as given after ``--opts``.
        overrides: ``{'SECTION.KEY': value}`` of highest precedence; values are of the key's type or text.

    Raises:
        FileNotFoundError: ``cfg_file`` does not exist.
        ValueError: with all problems of the files, the options and their combination, one a line.
    """
    problems: list[str] = []
    layers = read_layers(cfg_file, problems)
    layers.append(Layer("--opts", _pairs(opts, problems)))
    layers.append(Layer(COMMAND_LINE, list((overrides or {}).items())))
    return _build(layers, problems, str(cfg_file))


def parse_config(text: str, name: str, overrides: Mapping[str, Any] | None = None) -> CfgNode:
    """Read a configuration from the text that ``dump_config`` made.

    Args:
        text: the YAML text.
        name: where the text comes from, for messages.
        overrides: ``{'SECTION.KEY': value}`` of higher precedence.

    Raises:
        ValueError: with all problems, one a line.
    """
    problems: list[str] = []
    layers = [text_layer(text, name, problems), Layer(COMMAND_LINE, list((overrides or {}).items()))]
    return _build(layers, problems, name)


def dump_config(config: CfgNode) -> str:
    """Return the whole configuration as YAML text without bases; reading it again gives an equal configuration."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def run_folder(config: CfgNode) -> Path:
    """Return the output folder of the run: ``OUTPUT/MODEL.NAME/TAG``, below ``output`` where OUTPUT is empty."""
    return Path(config.OUTPUT or "output") / config.MODEL.NAME / config.TAG


def require_known_key(key: str) -> None:
    """Raise a ValueError with the nearest known name if ``key`` is not a key of the configuration."""
    known = flatten(default_config())
    if key not in known:
        raise ValueError(f"{key} is not a known key{nearest(key, known)}")


def _build(layers: list[Layer], problems: list[str], name: str) -> CfgNode:
    """Merge the layers into the defaults, check the result and freeze it."""
    config = default_config()
    given: dict[str, str] = {}  # key -> the source that set it last, for messages
    for layer in layers:
        _merge(config, layer, given, problems)
    _apply_amp_opt_level(config, given, problems)
    for problem in check_config(config):
        sources = {f"{key} from {given[key]}" for key in problem.keys if key in given}
        problems.append(problem.text + (f" ({', '.join(sorted(sources))})" if sources else ""))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{count} in the configuration of {name}:\n" + "\n".join(f"  - {line}" for line in problems))
    config.freeze()
    return config


def _merge(config: CfgNode, layer: Layer, given: dict[str, str], problems: list[str]) -> None:
    """Set the layer's values in ``config``, note their source in ``given``, and report what cannot be set."""
    defaults = flatten(default_config())
    known_sections = set(sections(config))
    for key, value in layer.values:
        if key in defaults:
            try:
                set_key(config, key, convert(key, value, defaults[key], CHOICES.get(key, ())))
                given[key] = layer.label
            except ValueError as error:
                problems.append(f"{layer.label}: {key}: {error}")
        elif key in known_sections:
            if value not in ("", None):
                problems.append(f"{layer.label}: {key} is a section; give its keys, such as {_first_key(key)}")
        elif key in RETIRED_KEYS:
            problems.append(f"{layer.label}: {key} is no key here: {RETIRED_KEYS[key]}")
        else:
            problems.append(f"{layer.label}: unknown key {key}{nearest(key, defaults)}")


def _first_key(section: str) -> str:
    return next(key for key in flatten(default_config()) if key.startswith(f"{section}."))


def _pairs(opts: Sequence[str], problems: list[str]) -> list[tuple[str, Any]]:
    """Split the words after ``--opts`` into (key, value) pairs."""
    pairs: list[tuple[str, Any]] = []
    rest = list(opts)
    while rest:
        word = rest.pop(0)
        if "=" in word:
            key, value = word.split("=", 1)
            pairs.append((key, value))
        elif rest:
            pairs.append((word, rest.pop(0)))
        else:
            problems.append(f"--opts: {word} has no value; give pairs such as TRAIN.EPOCHS 100 or TRAIN.EPOCHS=100")
    return pairs


def _apply_amp_opt_level(config: CfgNode, given: Mapping[str, str], problems: list[str]) -> None:
    """Translate the published AMP_OPT_LEVEL into TRAIN.AMP, unless both are given and contradict each other."""
    if not config.AMP_OPT_LEVEL:
        return
    wanted = AMP_OF_OPT_LEVEL[config.AMP_OPT_LEVEL]
    if "TRAIN.AMP" in given and config.TRAIN.AMP != wanted:
        problems.append(
            f"AMP_OPT_LEVEL is {config.AMP_OPT_LEVEL} (from {given['AMP_OPT_LEVEL']}), which means {wanted}, but "
            f"TRAIN.AMP is {config.TRAIN.AMP} (from {given['TRAIN.AMP']}); give only --amp"
        )
        return
    config.TRAIN.AMP = wanted


def _plain(value: Any) -> Any:
    """Return sections as dicts and tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
