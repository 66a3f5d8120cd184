"""What a training state has to look like, written as data and checked before anything live is touched.

A check is a function of a value and its name that raises ``SchemaFault``; larger checks are built of smaller ones.
``STATE`` is what every state must be, ``fitting`` what it must be for the model and optimizer of this run.
"""

import math
import random
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from utils.training import Progress, TrainState, batchnorm_buffers, is_fused, kept_state

Check = Callable[[Any, str], None]
MAX_CONFIG = 2**16  # characters; ours have about 4,000


class SchemaFault(ValueError):
    """A value is not what it has to be; the message names it."""


def anything(_value: Any, _name: str) -> None:
    """Accept every value."""


def integer(low: int = 0, high: int = 2**63 - 1) -> Check:
    """Return a check for an int of a range, ends included."""

    def check(value: Any, name: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise SchemaFault(f"{name} is {_brief(value)}, not a whole number from {low} to {high}")

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """Return a check for a finite int or float of a range, ends included."""

    def check(value: Any, name: str) -> None:
        finite = type(value) in (int, float) and abs(value) < 1e300
        if not finite or not low <= value <= high:
            raise SchemaFault(f"{name} is {_brief(value)}, not a finite number from {low} to {high}")

    return check


def text(limit: int = 10_000) -> Check:
    """Return a check for a text of at most ``limit`` characters."""

    def check(value: Any, name: str) -> None:
        if type(value) is not str or len(value) > limit:
            found = f"has {len(value):,} characters" if type(value) is str else f"is {_brief(value)}"
            raise SchemaFault(f"{name} {found}, not a text of at most {limit:,}")

    return check


def either(*checks: Check) -> Check:
    """Return a check that one of ``checks`` has to pass."""

    def check(value: Any, name: str) -> None:
        for one in checks:
            try:
                return one(value, name)
            except SchemaFault as fault:
                first = fault
        raise first

    return check


def boolean(value: Any, name: str) -> None:
    """Accept True and False."""
    if type(value) is not bool:
        raise SchemaFault(f"{name} is {_brief(value)}, not True or False")


def nothing(value: Any, name: str) -> None:
    """Accept None."""
    if value is not None:
        raise SchemaFault(f"{name} is {_brief(value)}, not None")


def sequence(item: Check, length: int | None = None) -> Check:
    """Return a check for a list or tuple whose items pass ``item``."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
            wanted = "" if length is None else f" of {length}"
            found = f"has {len(value)} entries" if isinstance(value, (list, tuple)) else f"is {_brief(value)}"
            raise SchemaFault(f"{name} {found}, not a list{wanted}")
        for index, one in enumerate(value):
            item(one, f"{name}[{index}]")

    return check


def mapping(key: Check, value: Check) -> Check:
    """Return a check for a dict with any number of such keys and values."""

    def check(items: Any, name: str) -> None:
        if not isinstance(items, dict):
            raise SchemaFault(f"{name} is {_brief(items)}, not a dict")
        for one, content in items.items():
            key(one, f"a key of {name}")
            value(content, f"{name}.{one}")

    return check


def record(required: Mapping[Hashable, Check], *, optional: Mapping[Hashable, Check] = {}, exact: bool = True) -> Check:
    """Return a check for a dict with these keys.

    Args:
        required: checks of the keys that must be there.
        optional: checks of those that may.
        exact: refuse any other.
    """
    known = {**optional, **required}

    def check(items: Any, name: str) -> None:
        start = f"{name}." if name else ""
        if not isinstance(items, dict):
            raise SchemaFault(f"{name} is {_brief(items)}, not a dict")
        for key in required:
            if key not in items:
                raise SchemaFault(f"{start}{key} missing")
        for key, value in items.items():
            if key in known:
                known[key](value, f"{start}{key}")
            elif exact or type(key) is not str:
                raise SchemaFault(f"{start}{_brief(key)} does not belong there")

    return check


def tensor(value: Any, name: str) -> None:
    """Accept a dense tensor with values."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise SchemaFault(f"{name} is {_brief(value)}, not a tensor with values")


def like(reference: Tensor, low: float = -math.inf) -> Check:
    """Return a check for a tensor of the shape and type of ``reference``, with finite values from ``low``."""

    def check(value: Any, name: str) -> None:
        tensor(value, name)
        if value.shape != reference.shape:
            raise SchemaFault(f"{name} has shape {list(value.shape)}, here {list(reference.shape)}")
        if value.dtype != reference.dtype:
            raise SchemaFault(f"{name} has type {value.dtype}, here {reference.dtype}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise SchemaFault(f"{name!r} has infinite or undefined values")
        if low > -math.inf and value.numel() and bool((value < low).any()):
            raise SchemaFault(f"{name} has values below {low:g}")

    return check


def loadable(load: Callable[[Any], None], shape: Check) -> Check:
    """Return a check for a random state that passes ``shape`` and that ``load``, a scratch generator's, accepts."""

    def check(value: Any, name: str) -> None:
        shape(value, name)
        try:
            load(value)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise SchemaFault(
                f"{name} is not the state of a random stream: {str(error).splitlines()[0][:80]}"
            ) from None

    return check


def _numpy_words(value: Any, name: str) -> None:
    tensor(value, name)
    words = value.shape == (624,) and value.dtype == torch.int64
    if not words or bool(((value < 0) | (value >= 2**32)).any()):
        raise SchemaFault(f"{name} is not 624 words of 32 bits")


def _numpy_state(value: Any, name: str) -> None:
    sequence(anything, 5)(value, name)
    checks = (text(10), _numpy_words, integer(0, 624), integer(0, 1), number())
    for index, check in enumerate(checks):
        check(value[index], f"{name}[{index}]")


def _python_state(value: Any, name: str) -> None:
    sequence(anything, 3)(value, name)
    sequence(integer(0, 2**32 - 1), 625)(value[1], f"{name}[1]")
    either(nothing, number())(value[2], f"{name}[2]")


def _bytes(value: Any, name: str) -> None:
    tensor(value, name)
    if value.dtype != torch.uint8 or value.ndim != 1:
        raise SchemaFault(f"{name} is not a list of bytes")


def _config(value: Any, name: str) -> None:
    """Accept a short text without YAML's aliases, which can make much of little."""
    text(MAX_CONFIG)(value, name)
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(value, Loader=yaml.SafeLoader)):
            raise SchemaFault(f"{name} has YAML aliases")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SchemaFault(f"{name}: {' '.join(str(error).split())[:200]}") from None


def _load_numpy(state: Any) -> None:
    kind, words, *rest = state
    np.random.RandomState().set_state((kind, words.numpy().astype(np.uint32), *rest))


CLASSES = sequence(text())
CONFIG = _config
_TENSORS = mapping(text(1000), tensor)
_RNG = record(
    {
        "python": loadable(lambda state: random.Random().setstate(state), _python_state),
        "numpy": loadable(_load_numpy, _numpy_state),
        "torch": loadable(lambda state: torch.Generator().set_state(state), _bytes),
    },
    optional={"cuda": _bytes},
)
_PLAIN = either(text(), boolean, number(), nothing, sequence(number()))
PREPROCESSING = mapping(text(100), _PLAIN)
_PROGRESS = {
    "global_step": integer(0, 2**48),
    "epoch": integer(0, 2**31),
    "samples_seen": integer(0, 2**48),
    "best_acc1": number(-1, 100),
    "best_epoch": integer(-1, 2**31),
}
assert set(_PROGRESS) == {field.name for field in fields(Progress)}

STATE = record(
    {
        "format_version": integer(1),
        "model": _TENSORS,
        "ema": either(nothing, _TENSORS),
        "optimizer": record(
            {
                "state": mapping(integer(), mapping(text(100), anything)),
                "param_groups": sequence(record({"params": sequence(integer())}, exact=False)),
            }
        ),
        "scaler": either(
            record({}),
            record(
                {
                    "scale": number(1e-30, 1e30),
                    "growth_factor": number(1, 1e6),
                    "backoff_factor": number(1e-6, 1),
                    "growth_interval": integer(1),
                    "_growth_tracker": integer(),
                }
            ),
        ),
        "guard": record({"skipped": integer(), "in_a_row": integer()}),
        "progress": record(_PROGRESS),
        "rank_state": sequence(
            record(
                {"rng": _RNG, "buffers": _TENSORS, "means": sequence(number(), 3)}, optional={"ema_buffers": _TENSORS}
            )
        ),
        "world_size": integer(1, 10**6),
        "config": _config,
    },
    optional={
        "lr": sequence(number(0)),
        "versions": mapping(text(100), either(text(200), integer())),
        "classes": CLASSES,
        "num_samples": integer(1),
        "held_out": text(100),
        "preprocessing": PREPROCESSING,
        "teacher": text(200),
        "seconds_used": number(0),
    },
    exact=False,
)

# What the numbers say about each other: (holds, what is wrong otherwise).
RULES: tuple[tuple[Callable[[dict[str, Any]], bool], str], ...] = (
    (lambda s: len(s["rank_state"]) == s["world_size"], "rank_state has not one entry per process (world_size)"),
    (lambda s: s["guard"]["skipped"] <= s["progress"]["global_step"], "guard.skipped is more than global_step"),
    (lambda s: s["guard"]["in_a_row"] <= s["guard"]["skipped"], "guard.in_a_row is more than skipped"),
    (lambda s: s["progress"]["epoch"] <= s["progress"]["global_step"], "progress.epoch is more than global_step"),
    (
        lambda s: not s["progress"]["samples_seen"] or s["progress"]["global_step"] > s["progress"]["epoch"],
        "progress.samples_seen does not fit global_step",
    ),
    (
        lambda s: s["progress"]["samples_seen"] <= s.get("num_samples", math.inf),
        "progress.samples_seen is more than num_samples",
    ),
    (lambda s: s["progress"]["best_epoch"] <= s["progress"]["epoch"] + 1, "progress.best_epoch is later than epoch"),
    (
        lambda s: (s["progress"]["best_epoch"] < 0) == (s["progress"]["best_acc1"] < 0),
        "progress.best_acc1 does not fit best_epoch",
    ),
    (lambda s: all(rank["means"][2] >= 0 for rank in s["rank_state"]), "rank_state: a number of updates is negative"),
)


def check_state(payload: dict[str, Any]) -> None:
    """Check a training state for itself.

    Raises:
        SchemaFault: the first thing that is wrong.
    """
    STATE(payload, "")
    for holds, otherwise in RULES:
        if not holds(payload):
            raise SchemaFault(otherwise)


def fitting(state: TrainState, global_step: int) -> Check:
    """Return the check of what a saved state must be to continue as ``state``, beyond its weights.

    Args:
        state: the live state.
        global_step: updates done by the saved one.
    """
    live = state.optimizer.state_dict()["param_groups"]
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    if is_fused(state.optimizer):
        moments = record({index: _moments(state.optimizer, p, global_step) for index, p in enumerate(parameters)})
        counters, may_be_empty = [{}] * len(live), global_step == 0 or state.optimizer.defaults.get("momentum") == 0
    else:
        kept, counters = kept_state(state.optimizer)
        moments = record({index: record(_kinds(entries)) for index, entries in kept.items()})
        may_be_empty = True  # it is not called in updates that are skipped
    if may_be_empty:
        moments = either(record({}), moments)
    buffers = {"buffers": _buffers(state.model)}
    if state.ema is not None:
        buffers["ema_buffers"] = _buffers(state.ema.module)

    def order(value: Any, name: str) -> None:
        if [group["params"] for group in value] != [group["params"] for group in live]:
            raise SchemaFault(f"{name} lists the parameters in another order")
        for index, (group, counts) in enumerate(zip(value, counters, strict=True)):
            record({}, optional=_kinds(counts), exact=False)(group, f"{name}[{index}]")

    return record(
        {
            "optimizer": record({"state": moments, "param_groups": order}),
            "rank_state": sequence(record(buffers, exact=False)),
        },
        exact=False,
    )


def _buffers(model: torch.nn.Module) -> Check:
    return record(
        {
            name: like(buffer, 0 if name.endswith(("running_var", "num_batches_tracked")) else -math.inf)
            for name, buffer in batchnorm_buffers(model).items()
        }
    )


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor, global_step: int) -> Check:
    """Return the check of what AdamW or SGD keeps of a parameter."""
    defaults = optimizer.defaults
    if "betas" in defaults:
        names = {"exp_avg": -math.inf, "exp_avg_sq": 0.0, **({"max_exp_avg_sq": 0.0} if defaults["amsgrad"] else {})}
        moments = {name: like(parameter, low) for name, low in names.items()}
        return record({"step": _update_count(global_step), **moments})
    if defaults["momentum"]:
        return record({"momentum_buffer": like(parameter)})
    return record({}, optional={"momentum_buffer": nothing})


def _kinds(entries: dict[str, Any]) -> dict[str, Check]:
    """Return a check for each entry that it is of the kind that it is here."""

    def kind(value: Any) -> Check:
        if isinstance(value, Tensor):
            return like(value)
        return boolean if isinstance(value, bool) else number()

    return {name: kind(value) for name, value in entries.items()}


def _update_count(most: int) -> Check:
    shape = like(torch.zeros(()), 0)

    def check(value: Any, name: str) -> None:
        shape(value, name)
        if float(value) != int(value) or int(value) > most:
            raise SchemaFault(f"{name} is {float(value):g}, not a number of updates up to {most}")

    return check


def _brief(value: Any) -> str:
    """Return a short description of a value, on one line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if value is None or type(value) in (int, float, bool):
        return repr(value)[:40]
    return ascii(value)[:40] if type(value) is str else f"a {type(value).__name__}"
