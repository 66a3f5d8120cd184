"""Names in the published checkpoints <-> names in this repository: pure functions from state dict to state dict.

The mapping only renames, so tensors pass through unchanged and shapes agree on both sides.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_BLOCK = r"^blocks(\d+)\.(\d+)\."
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")

# Published name (after the block prefix) <-> ours.
_BLOCK_PARTS = {
    "token_mixing.dwsc.conv_merge.BN": "strip_mixing.norm1",
    "token_mixing.dwsc.conv_merge.Conv": "strip_mixing.dwconv",
    "token_mixing.smlp_block.mlp.0": "strip_mixing.project",
    "token_mixing.smlp_block.mlp.1": "strip_mixing.norm2",
    "token_mixing.smlp_block.relate_pos_h.embeddings_table": "strip_mixing.cgsmm.row_position.table",
    "token_mixing.smlp_block.proj_h": "strip_mixing.cgsmm.row_mix.mix",
    "token_mixing.smlp_block.fuse_h": "strip_mixing.cgsmm.row_fuse",
    "token_mixing.smlp_block.BN": "strip_mixing.cgsmm.norm",
    "token_mixing.smlp_block.relate_pos_w.embeddings_table": "strip_mixing.cgsmm.column_position.table",
    "token_mixing.smlp_block.proj_w": "strip_mixing.cgsmm.column_mix.mix",
    "token_mixing.smlp_block.fuse_w": "strip_mixing.cgsmm.column_fuse",
    "token_mixing.smlp_block.fc_w": "strip_mixing.lsmm.tall",
    "token_mixing.smlp_block.fc_h": "strip_mixing.lsmm.wide",
    "token_mixing.smlp_block.reweight.fc1": "strip_mixing.lsmm.reweight1",
    "token_mixing.smlp_block.reweight.fc2": "strip_mixing.lsmm.reweight2",
    "token_mixing.smlp_block.fuse": "strip_mixing.fuse",
    "channel_mixing.conv_77": "channel_mixing.dwconv",
    "channel_mixing.layer_norm": "channel_mixing.norm",
    "channel_mixing.fc1": "channel_mixing.fc1",
    "channel_mixing.grn": "channel_mixing.grn",
    "channel_mixing.fc2": "channel_mixing.fc2",
}
_NET_PARTS = {
    "patch_embed": "patch_embed",
    "merging1": "merging.0",
    "merging2": "merging.1",
    "merging3": "merging.2",
    "conv_s1_28": "skip_1_to_3",
    "conv_s1_14": "skip_1_to_4",
    "conv_s2_14": "skip_2_to_4",
    "norm": "norm",
    "head": "head",
}
# The authors' detection code spells proj_w as proh_w; which spelling the released files use is not known.
_SPELLINGS = {"token_mixing.smlp_block.proh_w": "token_mixing.smlp_block.proj_w"}


def _rename(name: str, parts: Mapping[str, str]) -> str | None:
    """Return ``name`` with its longest leading part found in ``parts`` replaced, None if there is no such part."""
    stem, dot, leaf = name, "", ""
    while stem:
        if stem in parts:
            return f"{parts[stem]}{dot}{leaf}"
        stem, _, last = stem.rpartition(".")
        dot, leaf = ".", f"{last}.{leaf}" if leaf else last
    return None


def is_published(state_dict: Mapping[str, object]) -> bool:
    """Return whether the keys are those of a published checkpoint (wrapper prefixes aside)."""
    return any(re.match(_BLOCK, _WRAPPERS.sub("", name)) for name in state_dict)


def from_published(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename a published state dict to this repository's names.

    Prefixes ``module.`` and ``_orig_mod.`` are dropped and the spelling ``proh_w`` is accepted. Names that are not
    published ones, ours among them, pass through, so that a load report can show them.

    Raises:
        ValueError: if two keys would get the same name.
    """
    renamed: dict[str, Value] = {}
    for name, value in state_dict.items():
        plain = _WRAPPERS.sub("", name)
        block = re.match(_BLOCK, plain)
        if block:
            rest = plain[block.end() :]
            rest = _rename(rest, _SPELLINGS) or rest
            new = _rename(rest, _BLOCK_PARTS)
            ours = plain if new is None else f"stages.{int(block[1]) - 1}.{block[2]}.{new}"
        else:
            ours = _rename(plain, _NET_PARTS) or plain
        if ours in renamed:
            raise ValueError(f"two keys of the checkpoint become {ours!r}, the second is {name!r}; remove one of them")
        renamed[ours] = value
    return renamed


def to_published(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename this repository's state dict to the published names, the inverse of ``from_published``.

    Raises:
        KeyError: if a key has no published counterpart.
    """
    block_parts = {ours: published for published, ours in _BLOCK_PARTS.items()}
    net_parts = {ours: published for published, ours in _NET_PARTS.items()}
    renamed: dict[str, Value] = {}
    for name, value in state_dict.items():
        plain = _WRAPPERS.sub("", name)
        block = re.match(r"^stages\.(\d+)\.(\d+)\.", plain)
        parts, rest = (block_parts, plain[block.end() :]) if block else (net_parts, plain)
        new = _rename(rest, parts)
        if new is None:
            raise KeyError(f"{name!r} is not a parameter or buffer of Strip-MLP; it has no published name")
        renamed[f"blocks{int(block[1]) + 1}.{block[2]}.{new}" if block else new] = value
    return renamed
