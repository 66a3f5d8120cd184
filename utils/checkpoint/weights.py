"""Weights from a file into a model, with a report of exactly what was used."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoint.files import first_nonfinite, load_checkpoint, resolve_source, sha256
from utils.errors import CheckpointError

logger = logging.getLogger(__name__)

_PREFIXES = ("module.", "_orig_mod.")
_LISTED = 8  # names shown of each kind in messages


@dataclass
class LoadReport:
    """What was done with the entries of a weight file.

    Attributes:
        matched: model keys that were filled.
        renamed: how many of them had another name in the file.
        reshaped: keys whose shape differs: ``{key: (in the file, in the model)}``.
        missing: model keys that the file lacks.
        unexpected: file keys that the model lacks.
    """

    matched: list[str] = field(default_factory=list)
    renamed: int = 0
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the report as readable lines."""
        lines = [
            f"{len(self.matched)} matched ({self.renamed} renamed), {len(self.reshaped)} of another shape, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected"
        ]
        for key, (theirs, ours) in list(self.reshaped.items())[:_LISTED]:
            lines.append(f"  another shape: {key} is {list(theirs)} in the file, {list(ours)} in the model")
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                lines.append(f"  {kind}: {', '.join(names[:_LISTED])}{more}")
        return "\n".join(lines)


def extract_weights(
    payload: Mapping[str, Any], path: Path, *, prefer_ema: bool, require_ema: bool = False
) -> dict[str, Tensor]:
    """Return the weights of an opened checkpoint: ours, the published ones, timm's, or a bare state_dict.

    Args:
        payload: contents of the file.
        path: for messages.
        prefer_ema: take the averaged weights where the file has them.
        require_ema: take nothing else.

    Raises:
        CheckpointError: no weights were found.
    """
    averages = ("ema", "model_ema", "state_dict_ema")
    others = ("model", "state_dict", "model_state_dict", "model_ema", "ema")
    for name in averages if require_ema else (*(averages if prefer_ema else ()), *others):
        weights = payload.get(name)
        if isinstance(weights, Mapping) and weights:
            break
    else:
        if require_ema:
            raise CheckpointError(f"{path} holds no averaged weights; take its plain ones with --weights model")
        weights = payload
    weights = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    if not weights:
        found = ", ".join(map(str, list(payload)[:_LISTED]))
        raise CheckpointError(f"{path} holds no weights; its entries are {found}")
    for prefix in _PREFIXES:
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def load_weights(
    model: nn.Module,
    source: str,
    *,
    remap: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    prefer_ema: bool = False,
    require_ema: bool = False,
    replace_head: bool = False,
) -> tuple[LoadReport, dict[str, Any]]:
    """Fill ``model`` from the file ``source`` and return the report and the file's other entries.

    Keys and shapes are compared before any large tensor is read.

    Args:
        model: has ``get_classifier`` as timm's models do, if ``replace_head``.
        source: a path, or ``https://...#sha256=...``.
        remap: turns published names into the model's (``models.from_published``); names it does not know stay.
        prefer_ema, require_ema: see ``extract_weights``.
        replace_head: a classifier of another size keeps its fresh values (fine-tuning) instead of being an error.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: the file cannot be used; the message has the report.
    """
    path = resolve_source(source)
    choice = {"prefer_ema": prefer_ema, "require_ema": require_ema}
    shapes = extract_weights(load_checkpoint(path, map_location="meta"), path, **choice)
    report = _compare(model, shapes, remap)
    logger.info("weights from %s (sha256 %s): %s", path, sha256(path)[:16], report.text())
    _check_report(report, path, head=_head_keys(model), replace_head=replace_head)

    payload = load_checkpoint(path)
    weights = remap(extract_weights(payload, path, **choice))
    bad = first_nonfinite({key: weights[key] for key in report.matched})
    if bad is not None:
        raise CheckpointError(f"{path}: the entry {bad!r} has infinite or undefined values; that run had diverged")
    with torch.no_grad():
        own = model.state_dict()
        for key in report.matched:
            own[key].copy_(weights[key])
    fresh = ", ".join(sorted({*report.reshaped, *report.missing}))
    if fresh:
        logger.info("the classifier (%s) keeps its fresh values: the file's head has another size", fresh)
    rest = {key: value for key, value in payload.items() if key not in ("model", "ema", "optimizer", "rank_state")}
    return report, rest


def _compare(model: nn.Module, shapes: dict[str, Tensor], remap: Callable) -> LoadReport:
    """Compare names and shapes of the file's entries, still under their names there, with the model's."""
    renamed = remap(shapes)
    own = model.state_dict()
    report = LoadReport()
    for key, value in own.items():
        if key not in renamed:
            # Parameter-free counters are absent from some exports and do not influence the function.
            if not key.endswith("num_batches_tracked"):
                report.missing.append(key)
        elif renamed[key].shape != value.shape:
            report.reshaped[key] = (tuple(renamed[key].shape), tuple(value.shape))
        else:
            report.matched.append(key)
            report.renamed += key not in shapes
    report.unexpected = sorted(set(renamed) - set(own))
    return report


def _head_keys(model: nn.Module) -> set[str]:
    """Return the state-dict names of the classifier."""
    if not hasattr(model, "get_classifier"):
        return set()
    classifier = model.get_classifier()
    prefix = next((name for name, module in model.named_modules() if module is classifier), None)
    return {f"{prefix}.{name}" for name in classifier.state_dict()} if prefix else set()


def _check_report(report: LoadReport, path: Path, *, head: set[str], replace_head: bool) -> None:
    """Raise if weights would be left out: all of them, any that the model lacks, or any outside a replaced head."""
    own = {*report.reshaped, *report.missing}
    blocking = (own - head if replace_head else own) | set(report.unexpected)
    if not report.matched:
        advice = "none of its entries belongs to this model: is it a checkpoint of another architecture?"
    elif not blocking:
        return
    elif blocking <= head and not replace_head:
        advice = "only the classifier differs: set MODEL.NUM_CLASSES to the file's, or fine-tune with --pretrained"
    else:
        advice = "is MODEL.* of the config the variant that the file was made with?"
    raise CheckpointError(f"{path} does not fit the model: {report.text()}\n  {advice}")
