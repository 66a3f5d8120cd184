"""Configuration of a run: read, merged, checked as a whole, and frozen.

Order of precedence, lowest first: the defaults, the config's bases, the config file, ``--opts``, the flags of the
command line. Nothing changes a configuration after ``load_config``; what is known only at run time (number of
processes, scaled learning rate) lives elsewhere. Planning (docs/PLANNING.md) makes a new one, in which the values that
follow from memory and speed are written as if by hand. A configuration is data: no file that it names is ever executed.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from utils.config.checks import check_config
from utils.config.files import Layer, read_layers, text_layer
from utils.config.keys import KEYS, SECTIONS, default_config, only_trains, set_value
from utils.config.suggest import did_you_mean
from utils.config.values import expand_path

logger = logging.getLogger(__name__)

COMMAND_LINE = "the command line"
# What a stored configuration does not decide for a later call, besides all paths.
CALL_KEYS = ("MODEL.WEIGHTS_KEY", "MODEL.STRIP_PREFIX", "EVAL_MODE", "THROUGHPUT_MODE")
AMP_OF_OPT_LEVEL = {"O0": "off", "O1": "fp16", "O2": "fp16"}

# Keys that older versions of such configs hold, and where their value comes from now.
RETIRED_KEYS = {
    "LOCAL_RANK": "the launcher sets it through the environment variable LOCAL_RANK",
    "TRAIN.START_EPOCH": "it follows from the checkpoint given with --resume",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line for each problem.

    Attributes:
        config: what could be read of it.
    """

    def __init__(self, text: str, config: CfgNode) -> None:
        super().__init__(text)
        self.config = config


def load_config(cfg_file: str | Path, opts: Sequence[str] = (), overrides: Mapping[str, Any] | None = None) -> CfgNode:
    """Read a config file with its bases, apply what the command line says, check everything, and freeze it.

    Args:
        cfg_file: path of a ``.yaml`` or ``.yml`` file.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]``, or entries ``KEY=VALUE``, as given after ``--opts``.
        overrides: ``{'SECTION.KEY': value}`` of highest precedence; values are of the key's type or text.

    Raises:
        FileNotFoundError: ``cfg_file`` does not exist.
        ValueError: with all problems of the files, the options and their combination, one per line.
    """
    return load_with_sources(cfg_file, opts, overrides)[0]


def load_with_sources(
    cfg_file: str | Path, opts: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> tuple[CfgNode, dict[str, str]]:
    """Do what ``load_config`` does, and also return ``{'SECTION.KEY': source}`` of all keys that a source sets."""
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
        overrides: as in ``load_config``.

    Raises:
        ValueError: with all problems, one per line.
    """
    problems: list[str] = []
    layers = [text_layer(text, name, problems), Layer(COMMAND_LINE, list((overrides or {}).items()))]
    return _build(layers, problems, name)[0]


def load_stored_config(
    text: str, name: str, opts: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> tuple[CfgNode, dict[str, str]]:
    """Read the configuration that a checkpoint holds, to evaluate the checkpoint, and apply the command line.

    Places (paths of data, caches, output and weights) and what that run was asked to do are not taken from it: they
    belong to the machine and the call. For an evaluation, what only training reads may be anything: keys and values
    that other versions of this project know are left out, and logged.

    Args:
        text: the YAML text that ``dump_config`` made.
        name: the checkpoint, for messages.
        opts, overrides: as in ``load_config``.

    Returns:
        (frozen configuration, source of each key that is given)

    Raises:
        ValueError: with all problems, one per line.
    """
    problems: list[str] = []
    stored = text_layer(text, name, problems)
    kept = [(key, value) for key, value in stored.values if not (key in KEYS and _belongs_to_call(key))]
    if (overrides or {}).get("EVAL_MODE"):
        kept = _without_strange_training(kept, name)
    layers = [
        Layer(name, kept, expand=False),
        Layer("--opts", _pairs(opts, problems)),
        Layer(COMMAND_LINE, list((overrides or {}).items())),
    ]
    return _build(layers, problems, name)


def _without_strange_training(values: list[tuple[str, Any]], name: str) -> list[tuple[str, Any]]:
    """Return the stored values without those that only training reads and that this version cannot read."""
    strange = [key for key, value in values if only_trains(key) and not _readable(key, value)]
    if strange:
        logger.warning("%s was trained with settings unknown here, which evaluation does not need: %s", name, strange)
    return [(key, value) for key, value in values if key not in strange]


def _readable(key: str, value: Any) -> bool:
    try:
        return key in KEYS and KEYS[key].in_range(KEYS[key].read(value))
    except ValueError:
        return False


def _belongs_to_call(key: str) -> bool:
    return KEYS[key].is_path or key in CALL_KEYS


def run_folder(config: CfgNode) -> Path:
    """Return the output folder of the run: ``OUTPUT/MODEL.NAME/TAG``, below ``output`` where OUTPUT is empty."""
    return Path(config.OUTPUT or "output") / config.MODEL.NAME / config.TAG


def _build(layers: list[Layer], problems: list[str], name: str) -> tuple[CfgNode, dict[str, str]]:
    """Merge the layers into the defaults, check the result and freeze it; return it with each given key's source."""
    config = default_config()
    given: dict[str, str] = {}  # key -> the source that set it last
    for layer in layers:
        _merge(config, layer, given, problems)
    _apply_amp_opt_level(config, given, problems)
    for problem in check_config(config):
        sources = {f"{key} from {given[key]}" for key in problem.keys if key in given}
        problems.append(problem.text + (f" ({', '.join(sorted(sources))})" if sources else ""))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        text = f"{count} in the configuration of {name}:\n" + "\n".join(f"  - {line}" for line in problems)
        raise ConfigError(text, config)
    config.freeze()
    return config, given


def _merge(config: CfgNode, layer: Layer, given: dict[str, str], problems: list[str]) -> None:
    """Set the layer's values in ``config``, note their source in ``given``, and report what cannot be set."""
    for name, value in layer.values:
        if name in KEYS:
            try:
                value = KEYS[name].read(value)
                set_value(config, name, expand_path(value) if KEYS[name].is_path and layer.expand else value)
                given[name] = layer.label
            except ValueError as error:
                problems.append(f"{layer.label}: {name}: {error}")
        elif name in SECTIONS:
            if value not in ("", None):
                first = next(key for key in KEYS if key.startswith(f"{name}."))
                problems.append(f"{layer.label}: {name} is a section; give its keys, such as {first}")
        elif name in RETIRED_KEYS:
            problems.append(f"{layer.label}: {name} is not a key here: {RETIRED_KEYS[name]}")
        else:
            problems.append(f"{layer.label}: unknown key {name}{did_you_mean(name, KEYS)}")


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


def _apply_amp_opt_level(config: CfgNode, given: dict[str, str], problems: list[str]) -> None:
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
    given.setdefault("TRAIN.AMP", f"AMP_OPT_LEVEL from {given['AMP_OPT_LEVEL']}")
