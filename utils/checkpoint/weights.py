"""Weights from a file into a model, with a report of exactly what was used."""

import copy
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from utils.checkpoint.files import first_nonfinite, load_checkpoint, resolve_source, sha256
from utils.config import as_pair
from utils.errors import CheckpointError

logger = logging.getLogger(__name__)

Fit = Callable[[dict[str, Tensor], nn.Module], tuple[dict[str, Tensor], list[str]]]  # see ``load_weights``

_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|averaged)(?:[._]|$)")  # entries of averaged weights
_DEPTH = 2  # levels of a file that are searched for weights
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
        fresh: keys of the classifier that fit, but are for other classes.
        fitted: a sentence for each change that made weights for another input fit this model.
    """

    matched: list[str] = field(default_factory=list)
    renamed: int = 0
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    fitted: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the report as readable lines."""
        lines = [
            f"{len(self.matched)} matched ({self.renamed} renamed), {len(self.reshaped)} of another shape, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected"
        ]
        lines += [f"  {change}" for change in self.fitted]
        for key, (theirs, ours) in list(self.reshaped.items())[:_LISTED]:
            lines.append(f"  another shape: {key} is {list(theirs)} in the file, {list(ours)} in the model")
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                lines.append(f"  {kind}: {', '.join(names[:_LISTED])}{more}")
        return "\n".join(lines)


def weight_options(config: CfgNode) -> dict[str, Any]:
    """Return the arguments of ``load_weights`` that the configuration sets."""
    return {
        "key": config.MODEL.WEIGHTS_KEY,
        "prefix": config.MODEL.STRIP_PREFIX,
        "img_size": config.DATA.IMG_SIZE,
    }


@dataclass(frozen=True)
class _Candidate:
    """An entry of a file that may hold the weights, ``prefix`` being what is taken off its names."""

    entry: str  # dotted; empty: the file itself
    prefix: str
    weights: dict[str, Tensor]
    fitting: int  # names that the model has too

    def __str__(self) -> str:
        where = f"entry {self.entry!r}" if self.entry else "the file itself"
        return where + (f" without the prefix {self.prefix!r}" if self.prefix else "")


class WeightFinder:
    """Finds the weights of a model in files of this and other projects, whatever the entry and prefix are called.

    Args:
        own: names of the model.
        remap: see ``load_weights``.
        key: the entry, dotted; empty: the one that fits.
        prefix: taken off the names, entries without it are left out; empty: what all names share, if that makes more
            of them fit.
        prefer_ema: take averaged weights where the file has them.
        require_ema: take nothing else.
    """

    def __init__(
        self,
        own: Collection[str],
        remap: Callable,
        *,
        key: str = "",
        prefix: str = "",
        prefer_ema: bool = False,
        require_ema: bool = False,
    ) -> None:
        self._own, self._remap = set(own), remap
        self._key, self._prefix = key, prefix
        self._prefer_ema, self._require_ema = prefer_ema, require_ema

    def find(self, payload: Mapping[str, Any], path: Path) -> _Candidate:
        """Return the entry of an opened file that holds the weights.

        Raises:
            CheckpointError: there are none, or several that fit; lists them and the flags that choose.
        """
        entries = _tensor_entries(payload)
        if not entries:
            raise CheckpointError(f"{path} holds no weights; its entries are {_some(list(map(str, payload)))}")
        if self._key:
            if self._key not in entries:
                raise CheckpointError(
                    f"{path} holds no weights under {self._key!r} (--weights-key): {_some(list(entries))}"
                )
            return self._best_prefix(self._key, entries[self._key], path)
        averaged = {name: entries[name] for name in entries if _AVERAGE.search(name)}
        plain = {name: entries[name] for name in entries if name not in averaged}
        if self._require_ema and not averaged:
            raise CheckpointError(f"{path} holds no averaged weights; take its plain ones with --weights model")
        groups = (averaged, plain) if self._prefer_ema or self._require_ema else (plain, averaged)
        for group in groups[:1] if self._require_ema else groups:
            candidates = [self._best_prefix(name, weights, path) for name, weights in group.items()]
            best = max((c.fitting for c in candidates), default=0)
            if best:
                return _only([c for c in candidates if c.fitting > best / 2], path)
        entry = max(entries, key=lambda name: len(entries[name]))
        return self._best_prefix(entry, entries[entry], path)

    def _best_prefix(self, entry: str, weights: dict[str, Tensor], path: Path) -> _Candidate:
        weights = {name: value for name, value in weights.items() if name in self._own or not _is_counter(name)}
        if self._prefix:
            inside = {n.removeprefix(self._prefix): v for n, v in weights.items() if n.startswith(self._prefix)}
            if not inside:
                raise CheckpointError(
                    f"{path}: no name starts with {self._prefix!r} (--strip-prefix): {_some(list(weights))}"
                )
            return _Candidate(entry, self._prefix, inside, self._fitting(inside))
        best = _Candidate(entry, "", weights, self._fitting(weights))
        prefix = ""
        while weights and len(first := {name.partition(".")[0] for name in weights}) == 1:
            part = f"{first.pop()}."
            if not all(name.startswith(part) for name in weights):
                break
            prefix += part
            weights = {name.removeprefix(part): value for name, value in weights.items()}
            fitting = self._fitting(weights)
            if fitting and fitting >= best.fitting:
                best = _Candidate(entry, prefix, weights, fitting)
        return best

    def _fitting(self, weights: dict[str, Tensor]) -> int:
        return len(self._own & set(self._remap(weights)))


def _tensor_entries(payload: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return the mappings of names to tensors in a file: itself, its entries, and theirs under dotted names."""
    found = {}
    todo: list[tuple[str, Any, int]] = [("", payload, 0)]
    while todo:
        entry, content, depth = todo.pop(0)
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if any(not _is_counter(name) for name in tensors):
            found[entry] = tensors
        if depth < _DEPTH:
            inner = [(k, v) for k, v in content.items() if isinstance(k, str) and isinstance(v, Mapping)]
            todo += [(f"{entry}.{k}" if entry else k, v, depth + 1) for k, v in inner]
    return found


def _only(candidates: list[_Candidate], path: Path) -> _Candidate:
    """Return the one candidate, or raise a CheckpointError that lists all."""
    if len(candidates) > 1:
        raise CheckpointError(
            f"{path} holds several weights that fit this model: {'; '.join(map(str, candidates))}. "
            "Choose with --weights-key NAME, if need be with --strip-prefix PREFIX"
        )
    return candidates[0]


def _is_counter(name: str) -> bool:
    """Return whether an entry counts something for a profiler or an average, and is not a weight."""
    return name.rpartition(".")[2] in ("total_ops", "total_params", "n_averaged")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"


def _unchanged(weights: dict[str, Tensor], _model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Leave weights for another input as they are, which makes them an error."""
    return weights, []


def load_weights(
    model: nn.Module,
    source: str,
    *,
    remap: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    fit: Fit = _unchanged,
    replace_head: bool = False,
    classes: Sequence[str] | None = None,
    img_size: int | tuple[int, int] = 0,
    **choice: Any,
) -> tuple[LoadReport, dict[str, Any]]:
    """Fill ``model`` from the file ``source`` and return the report and the file's other entries.

    Keys and shapes are compared before any large tensor is read.

    Args:
        model: has ``get_classifier`` as timm's models do, if ``replace_head``.
        source: a path, or ``https://...#sha256=...``.
        remap: turns published names into the model's (``models.from_published``); names it does not know stay.
        fit: turns weights for another input into the model's (``models.fit_weights``) and says what it changed, on the
            meta device too. By default, weights for another input are an error.
        replace_head: a classifier of another size or for other classes keeps its fresh values (fine-tuning) instead of
            being an error.
        classes: the data set's, compared with the file's if ``replace_head``.
        img_size: size of the model's input, for messages.
        choice: ``key``, ``prefix``, ``prefer_ema`` and ``require_ema`` of ``WeightFinder``.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: the file cannot be used; the message has the report.
    """
    path = resolve_source(source)
    finder = WeightFinder(model.state_dict(), remap, **choice)
    shapes = load_checkpoint(path, map_location="meta")
    taken = finder.find(shapes, path)
    report = _compare(model, taken.weights, remap, fit)
    head = _head_keys(model) if replace_head or report.reshaped else set()
    if replace_head and classes is not None and _other_classes(shapes, classes):
        report.fresh = [key for key in report.matched if key in head]
        report.matched = [key for key in report.matched if key not in head]
    level = logging.WARNING if report.fitted else logging.INFO
    logger.log(level, "weights from %s (sha256 %s), %s: %s", path, sha256(path)[:16], taken, report.text())
    _check_report(report, path, head=head, replace_head=replace_head, sizes=(_image_size(shapes), as_pair(img_size)))

    payload = load_checkpoint(path)
    weights, _ = fit(remap(finder.find(payload, path).weights), model)
    _fill(model, {key: weights[key] for key in report.matched}, path)
    _log_fresh(report)
    left_out = {"optimizer", "rank_state", *(entry.partition(".")[0] for entry in _tensor_entries(payload))}
    return report, {k: v for k, v in payload.items() if k not in left_out and not isinstance(v, Tensor)}


@torch.no_grad()
def _fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copy ``weights`` into the model; infinite or undefined ones are an error."""
    bad = first_nonfinite(weights)
    if bad is not None:
        raise CheckpointError(f"{path}: the entry {bad!r} has infinite or undefined values; that run had diverged")
    own = model.state_dict()
    for key, value in weights.items():
        own[key].copy_(value)


def _other_classes(payload: Mapping[str, Any], classes: Sequence[str]) -> bool:
    """Return whether a file says that its classifier is for other classes, or for these in another order."""
    theirs = payload.get("classes")
    return isinstance(theirs, (list, tuple)) and bool(theirs) and list(theirs) != list(classes)


def _log_fresh(report: LoadReport) -> None:
    fresh = ", ".join(sorted({*report.reshaped, *report.missing, *report.fresh}))
    if fresh:
        why = "is for other classes" if report.fresh else "has another size"
        logger.info("the classifier (%s) keeps its fresh values: the file's head %s", fresh, why)


def _image_size(payload: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the image size, (height, width), that a file says it was made for; empty if it says none."""
    for names in (("preprocessing", "img_size"), ("config", "DATA", "IMG_SIZE")):
        value: Any = payload
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, int):
            return value, value
        if isinstance(value, (list, tuple)) and len(value) == 2:
            return tuple(value)
    return ()


def _compare(model: nn.Module, shapes: dict[str, Tensor], remap: Callable, fit: Fit) -> LoadReport:
    """Compare names and shapes of the file's entries, still under their names there, with the model's."""
    renamed, fitted = fit(remap(shapes), model)
    own = model.state_dict()
    report = LoadReport(fitted=fitted)
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
    """Return the state-dict names of the classifier: all heads, where a timm model has several."""
    if not hasattr(model, "get_classifier"):
        return set()
    if hasattr(model, "reset_classifier"):
        other = copy.deepcopy(model).to("meta")
        other.reset_classifier(model.num_classes + 1)
        shapes = {name: value.shape for name, value in other.state_dict().items()}
        return {name for name, value in model.state_dict().items() if shapes.get(name) != value.shape}
    classifier = model.get_classifier()
    prefix = next((name for name, module in model.named_modules() if module is classifier), None)
    return {f"{prefix}.{name}" for name in classifier.state_dict()} if prefix else set()


def _differ_in_channels(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    """Return whether two convolution weights differ in their input channels alone."""
    return (
        len(theirs) == len(ours) == 4 and theirs[1] != ours[1] and (*theirs[:1], *theirs[2:]) == (*ours[:1], *ours[2:])
    )


def _check_report(
    report: LoadReport, path: Path, *, head: set[str], replace_head: bool, sizes: tuple[tuple[int, ...], ...]
) -> None:
    """Raise if weights would be left out: all of them, any that the model lacks, or any outside a replaced head."""
    own = {*report.reshaped, *report.missing}
    blocking = (own - head if replace_head else own) | set(report.unexpected)
    if not report.matched:
        advice = "none of its entries belongs to this model: is it a checkpoint of another architecture?"
    elif not blocking:
        return
    elif blocking <= head and not replace_head:
        count = next((f" ({theirs[0]})" for theirs, _ in report.reshaped.values()), "")
        advice = (
            f"only the classifier differs: set MODEL.NUM_CLASSES to the file's{count}, or fine-tune with --pretrained"
        )
    elif stem := next((pair for pair in report.reshaped.values() if _differ_in_channels(*pair)), None):
        advice = (
            f"its stem takes images of {stem[0][1]} channels, this model {stem[1][1]}; only one for 3 channels is "
            f"adapted: set MODEL.STRIP_MLP.IN_CHANS {stem[0][1]}"
        )
    elif sizes[0] and any(sizes[1]) and sizes[0] != sizes[1]:
        advice = (
            f"the file is for images of {sizes[0][0]} x {sizes[0][1]} pixels, this model for {sizes[1][0]} x "
            f"{sizes[1][1]}: set --opts DATA.IMG_SIZE {','.join(map(str, dict.fromkeys(sizes[0])))}"
        )
    else:
        advice = "is MODEL.* (and DATA.IMG_SIZE) of the config the variant that the file was made with?"
    raise CheckpointError(f"{path} does not fit the model: {report.text()}\n  {advice}")
