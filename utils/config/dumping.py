"""From a configuration to text that can be read as a config file again."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from yacs.config import CfgNode

from utils.config.keys import KEYS


def dump_config(config: CfgNode) -> str:
    """Return the whole configuration as YAML text without bases; reading it again gives an equal configuration."""
    return _to_yaml(config)


def annotate_config(config: CfgNode, sources: Mapping[str, str]) -> str:
    """Return what ``dump_config`` returns, with a comment that names the source of each value that is not the default.

    Args:
        config: the configuration.
        sources: ``{'SECTION.KEY': source}``, such as ``load_with_sources`` returns.
    """
    return "".join(f"{line}\n" for line in _annotated_lines(config, sources))


def _annotated_lines(node: CfgNode, sources: Mapping[str, str], section: str = "") -> Iterator[str]:
    indent = "  " * section.count(".")
    for leaf, value in node.items():
        name = f"{section}{leaf}"
        if isinstance(value, CfgNode):
            yield f"{indent}{leaf}:"
            yield from _annotated_lines(value, sources, f"{name}.")
        else:
            line = indent + _to_yaml({leaf: value}).rstrip("\n")
            source = sources[name] if value != KEYS[name].default else ""
            yield f"{line}  # {source if source.isprintable() else ascii(source)}" if source else line


def _to_yaml(value: dict[str, Any]) -> str:
    return yaml.dump(_plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that writes each value on one line."""

    def represent_sequence(self, tag: str, sequence: Sequence[Any], flow_style: bool | None = None) -> yaml.Node:
        """Represent a list as ``[a, b]``."""
        return super().represent_sequence(tag, sequence, flow_style=True)

    def represent_scalar(self, tag: str, value: str, style: str | None = None) -> yaml.Node:
        r"""Represent a line break as ``\n`` in double quotes."""
        return super().represent_scalar(tag, value, style='"' if "\n" in value else style)


def _plain(value: Any) -> Any:
    """Return sections as dicts and tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
