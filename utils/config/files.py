"""Reading a config file and the files it is based on. Files are data: nothing in them is ever executed.

A file may name others under ``BASE`` (one path or a list, relative to the file that names them). Bases are merged
left to right, then the file itself. yacs' own reader is not used, because it runs a ``.py`` file.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.config.keys import SECTIONS
from utils.config.suggest import did_you_mean
from utils.config.values import expand_path

SUFFIXES = (".yaml", ".yml")
MAX_DEPTH = 8  # files in one chain of bases
SHIPPED_CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Layer:
    """Values from one source, in the order in which they are merged.

    Attributes:
        label: the source, for messages: a path or "the command line".
        expand: replace ``~`` and ``$VARIABLE`` in paths; a stored configuration is taken as it is.
        values: (dotted key, value) pairs; the values are texts or lists of texts where they come from a file.
    """

    label: str
    values: list[tuple[str, Any]]
    expand: bool = True


def read_layers(cfg_file: str | Path, problems: list[str]) -> list[Layer]:
    """Read ``cfg_file`` and all its bases, the first to be merged first.

    Args:
        cfg_file: path of a ``.yaml`` or ``.yml`` file.
        problems: list to which everything wrong in the files is appended.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(expand_path(os.fspath(cfg_file)))
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist{_look_alikes(path)}")
    folders = [SHIPPED_CONFIGS, path.resolve().parent]
    layers: list[Layer] = []
    _read_chain((path,), folders, layers, problems)
    return layers


def text_layer(text: str, label: str, problems: list[str]) -> Layer:
    """Read a self-contained config from memory, such as the text that a checkpoint holds."""
    content = _parse_yaml(text.encode(), label, problems)
    if any(content.pop("BASE", [])):
        problems.append(f"{label}: BASE is not possible here, this config has no folder")
    return Layer(label, _flatten(content), expand=False)


def _read_chain(chain: tuple[Path, ...], folders: list[Path], layers: list[Layer], problems: list[str]) -> None:
    """Append the layers of the last file of ``chain``: its bases first, then its own."""
    path = chain[-1]
    fault = _chain_fault(chain, folders)
    if fault:
        problems.append(fault if len(chain) == 1 else f"{fault} (chain: {' -> '.join(map(str, chain))})")
        return
    content = _parse_yaml(path.read_bytes(), str(path), problems)
    bases = content.pop("BASE", [])
    bases = [bases] if isinstance(bases, str) else bases
    if isinstance(bases, list) and all(isinstance(base, str) for base in bases):
        for base in filter(None, bases):  # dumps of the published code hold BASE: ['']
            _read_chain((*chain, path.parent / base), folders, layers, problems)
    else:
        problems.append(f"{path}: BASE has to be a path or a list of paths")
    layers.append(Layer(str(path), _flatten(content)))


def _chain_fault(chain: tuple[Path, ...], folders: list[Path]) -> str:
    """Return why the last file of ``chain`` must not be read, or an empty text."""
    path = chain[-1]
    resolved = path.resolve()
    if path.suffix.lower() not in SUFFIXES:
        return f"{path}: a config is a {' or '.join(SUFFIXES)} file, and a config never runs Python"
    if not any(resolved.is_relative_to(folder) for folder in folders):
        return f"{path}: BASE has to lie in {' or '.join(map(str, folders))} or below"
    if resolved in [earlier.resolve() for earlier in chain[:-1]]:
        return f"{path}: BASE goes round in a circle"
    if len(chain) > MAX_DEPTH:
        return f"{path}: the chain of bases is longer than {MAX_DEPTH} files"
    if not resolved.is_file():
        return f"{path}: this BASE does not exist{_look_alikes(path)}"
    return ""


def _look_alikes(path: Path) -> str:
    """Return a hint at the config file beside ``path`` whose name is nearest, if any."""
    folder = path.parent
    paths = {p.stem: p for p in folder.iterdir() if p.suffix in SUFFIXES} if folder.is_dir() else {}
    return did_you_mean(path.stem, paths, show=paths.__getitem__)


class _TextLoader(yaml.SafeLoader):
    """Safe loader that leaves every plain value as text and notes keys that are given twice."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Build the mapping of ``node`` after noting its duplicate keys with their lines."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                self.duplicates.append(f"{key.value} in line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _parse_yaml(source: bytes, label: str, problems: list[str]) -> dict[str, Any]:
    """Return the sections of a YAML text, all values as text; on a fault report it and return what can be used."""
    loader = None
    try:
        loader = _TextLoader(source)
        content = loader.get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        problems.append(f"{label}: cannot be read as YAML: {' '.join(str(error).split())}")
        return {}
    finally:
        if loader is not None:
            loader.dispose()
    problems.extend(f"{label}: key given twice: {duplicate}" for duplicate in loader.duplicates)
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        problems.append(f"{label}: a config holds sections such as MODEL: and TRAIN:, this one does not")
        return {}
    return content


def _flatten(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) pairs; only known sections are entered, so an alias that nests itself ends."""
    pairs: list[tuple[str, Any]] = []
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in SECTIONS:
            pairs.extend(_flatten(value, f"{key}."))
        else:
            pairs.append((key, value))
    return pairs
