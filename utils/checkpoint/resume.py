"""Where a run starts: what a checkpoint says about itself, and whether this run may continue it."""

import logging
import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from yacs.config import CfgNode

from utils.checkpoint.files import load_checkpoint, resolve_source
from utils.checkpoint.schema import CLASSES, CONFIG, PREPROCESSING, Check, SchemaFault, text
from utils.checkpoint.store import CheckpointStore, step_inside
from utils.config import (
    SMALL,
    as_pair,
    dump_config,
    normalisation,
    parse_config,
    read_duration,
    recipe_differences,
    short_side,
    value_of,
)
from utils.errors import CheckpointError
from utils.runtime import gather_objects, on_main_process

logger = logging.getLogger(__name__)

# Keys that may change without permission: the log says so, and every sample is still seen once per epoch.
_BATCH_KEYS = ("DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS", "TRAIN.GLOBAL_BATCH")
# Keys to which the weights of a Strip-MLP belong. Only weights are fitted to another input, not a training state.
_INPUT_KEYS = ("DATA.IMG_SIZE", "MODEL.STRIP_MLP.IN_CHANS")


def starting_point(config: CfgNode, store: CheckpointStore, *, restarted: bool = False) -> Path | None:
    """Return the file to continue from: ``--resume``, else with ``TRAIN.AUTO_RESUME`` the run's own newest, or None.

    torchrun repeats the command when it restarts a failed run (``--max-restarts``). ``--resume`` is then meant for the
    first attempt: once the run is past that file, a later attempt goes on from the run's own newest. Rank 0 decides,
    whose files they are; the other hosts need none of them. Collective.

    Args:
        config: frozen config.
        store: the run's checkpoints.
        restarted: this process knows that the launcher has started the run before.

    Raises:
        CheckpointError, FileNotFoundError: a file cannot be used, or a host without rank 0 has newer ones.
    """
    source = config.MODEL.RESUME
    go_on = config.TRAIN.AUTO_RESUME and (any(gather_objects(restarted)) or not source)
    if go_on:
        _refuse_newer_elsewhere(store)
    newest = store.newest() if go_on else None
    if not source:
        return newest

    def later_one() -> Path:
        explicit = resolve_source(source)
        return newest if newest is not None and step_inside(newest) > step_inside(explicit) else explicit

    return on_main_process(later_one)


def _refuse_newer_elsewhere(store: CheckpointStore) -> None:
    """Raise a CheckpointError if the folder of the same name on another host than rank 0's has newer checkpoints."""
    rows = gather_objects((store.latest_step(), socket.gethostname()))
    step, host = max(rows, key=lambda row: row[0])
    ours, main_host = rows[0]
    if step > ours:
        there = f"update {ours}" if ours >= 0 else "none"
        raise CheckpointError(
            f"{store.directory} holds a checkpoint of update {step} on {host}, but {there} on {main_host}, which has "
            f"rank 0 now and writes the checkpoints. Copy the folder to {main_host}, or give all hosts a common one "
            f"(--output); if it is of an older run, delete it on {host}, or use --tag NEW"
        )


def kept_plan(config: CfgNode, store: CheckpointStore, world_size: int, *, restarted: bool = False) -> dict[str, Any]:
    """Return the values that were planned for the run of the starting point and stay in its continuation. Collective.

    A batch stays with the number of processes that it was planned for, a number of updates with its time budget.

    Args:
        config: this run's config.
        store, restarted: see ``starting_point``.
        world_size: processes of this run.

    Returns:
        ``{'SECTION.KEY': value}``; nothing of a file that is not a run's checkpoint.
    """
    planned = config.TRAIN.GLOBAL_BATCH or read_duration(config.TRAIN.TIME_BUDGET)
    path = starting_point(config, store, restarted=restarted) if planned else None

    def read() -> dict[str, Any]:
        payload = load_checkpoint(path, map_location="meta")
        if "config" not in payload:
            return {}
        saved = parse_config(_own_entry(payload, "config", CONFIG, path), str(path))
        plan = {}
        if config.TRAIN.GLOBAL_BATCH == saved.TRAIN.GLOBAL_BATCH > 0 and payload["world_size"] == world_size:
            plan |= {name: value_of(saved, name) for name in ("DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS")}
        budgets = [read_duration(one.TRAIN.TIME_BUDGET) for one in (config, saved)]
        if budgets[0] == budgets[1] > 0:
            plan["TRAIN.UPDATES"] = saved.TRAIN.UPDATES
        return plan

    return on_main_process(read) if path is not None else {}


def class_names(source: str) -> list[str]:
    """Return the class names that a checkpoint holds, in the order of its scores; none if it holds no names."""
    path = resolve_source(source)
    return list(stored_classes(load_checkpoint(path, map_location="meta"), path))


def checkpoint_metadata(
    config: CfgNode, classes: Sequence[str], num_samples: int, held_out: str | None = None
) -> dict[str, Any]:
    """Return the plain entries that make a checkpoint explain itself: config text, data set, preprocessing.

    Args:
        config: frozen config.
        classes: class names, in the order of the labels.
        num_samples: size of the training set.
        held_out: digest of the list of images that DATA.HOLDOUT keeps from it, if it does.
    """
    return {
        "config": dump_config(config),
        "classes": list(classes),
        "num_samples": num_samples,
        **({} if held_out is None else {"held_out": held_out}),
        "preprocessing": preprocessing(config),
    }


def preprocessing(config: CfgNode) -> dict[str, Any]:
    """Return what evaluation does to an image; see ``utils.config.short_side``."""
    side = short_side(config.DATA.IMG_SIZE, crop=config.TEST.CROP, ratio=config.TEST.CROP_RATIO)
    mean, std = normalisation(config)
    return {
        "img_size": _plain(config.DATA.IMG_SIZE),
        "interpolation": config.DATA.INTERPOLATION,
        "crop": side is not None,
        "short_side": _plain(side),
        "mean": list(mean),
        "std": list(std),
    }


def _plain(size: int | tuple[int, int] | None) -> int | list[int] | None:
    return list(size) if isinstance(size, tuple) else size


def stored_config(source: str | Path) -> str:
    """Return the text of the configuration that a checkpoint of this project was trained with.

    Args:
        source: a path, or ``https://...#sha256=...``.

    Raises:
        CheckpointError: the file holds none, or cannot be read.
        FileNotFoundError, ValueError: there is no such file.
    """
    path = resolve_source(str(source))
    payload = load_checkpoint(path, map_location="meta")
    if "format_version" not in payload or "config" not in payload:
        raise CheckpointError(
            f"{path} holds weights, but not the configuration of its model: it is not a checkpoint of this project's "
            "training. Name the config file of its model, such as --cfg configs/<leaf>.yaml"
        )
    return _own_entry(payload, "config", CONFIG, path)


def stored_classes(payload: dict[str, Any], path: Path | str) -> tuple[str, ...]:
    """Return the class names of a checkpoint in the order of its scores; empty if it has none."""
    return tuple(_own_entry(payload, "classes", CLASSES, path) or ())


def named_classes(names: str, num_classes: int) -> tuple[str, ...]:
    """Return the class names that TEST.CLASS_NAMES gives, in the order of the scores; empty if it is.

    Args:
        names: a file with one name per line; ``numbers`` for 0, 1, ...; or empty.
        num_classes: scores of the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not list as many different names as the model has classes.
    """
    if names in ("", "numbers"):
        return tuple(map(str, range(num_classes))) if names else ()
    if not Path(names).is_file():
        raise FileNotFoundError(f"TEST.CLASS_NAMES: no file {names} (one class name per line, or the word numbers)")
    lines = [line.strip() for line in Path(names).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if len(lines) != num_classes or len(set(lines)) != num_classes:
        raise ValueError(
            f"TEST.CLASS_NAMES: {names} lists {len(set(lines))} different names on {len(lines)} lines, but the model "
            f"has {num_classes} classes: it needs the name of each, on a line of its own"
        )
    return tuple(lines)


def check_continuation(
    config: CfgNode, metadata: dict[str, Any], payload: dict[str, Any], path: Path, allowed: Collection[str]
) -> None:
    """Refuse to continue under another recipe, with other classes or another teacher; warn of another sample count.

    Args:
        config: this run's config.
        metadata: this run's ``checkpoint_metadata``.
        payload: the checkpoint.
        path: for messages.
        allowed: keys of the recipe that may differ (``--allow-change KEY``).

    Raises:
        CheckpointError: recipe, classes or teacher differ.
    """
    check_recipe(config, payload, path, allowed)
    check_classes(metadata["classes"], payload, path)
    if "DATA.HOLDOUT" not in allowed:
        check_held_out(metadata.get("held_out"), payload, path)
    teachers = payload.get("teacher"), metadata.get("teacher")
    if None not in teachers and teachers[0] != teachers[1] and "TRAIN.DISTILL.TEACHER" not in allowed:
        raise CheckpointError(
            f"{path} was trained with another teacher: weights {teachers[0]} there, {teachers[1]} here (allow with "
            "--allow-change TRAIN.DISTILL.TEACHER)"
        )
    then, now = payload.get("num_samples", metadata["num_samples"]), metadata["num_samples"]
    if then != now:
        logger.warning(
            "%s was trained on %d images, this data set has %d: their order differs%s",
            path,
            then,
            now,
            ", so some may come twice or not at all in the epoch in progress"
            if payload["progress"]["samples_seen"]
            else "",
        )


def check_recipe(config: CfgNode, payload: dict[str, Any], path: Path, allowed: Collection[str]) -> None:
    """Refuse to continue a run under a recipe other than the one it was started with.

    Args:
        config: this run's config.
        payload: the checkpoint; its ``config`` entry is compared.
        path: for messages.
        allowed: keys that may differ (``--allow-change KEY``).

    Raises:
        CheckpointError: the file's config cannot be used, or keys that influence training differ and are not allowed;
            all of them are listed with both values.
    """
    try:
        saved = parse_config(payload["config"], str(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: its config cannot be used: {' '.join(str(error).split())}") from None
    most = saved.TRAIN.UPDATES or saved.TRAIN.EPOCHS  # an epoch has at least one update
    if payload["progress"]["epoch"] > most:
        raise CheckpointError(f"{path}: progress.epoch is {payload['progress']['epoch']}, of {most} epochs")
    differences = recipe_differences(saved, config)
    blocking = []
    for key, (then, now) in differences.items():
        if key in _INPUT_KEYS and config.MODEL.TYPE != "timm":
            blocking.append(
                f"  {key}: {then} in the checkpoint, {now} now: averaged weights and the optimizer's state cannot be "
                f"fitted to another input; start a new run from its weights: --pretrained {path} --tag NEW"
            )
        elif key in allowed or key in _BATCH_KEYS:
            logger.warning("%s changes on resume: %s -> %s", key, then, now)
        else:
            blocking.append(f"  {key}: {then} in the checkpoint, {now} now (allow with --allow-change {key})")
    if blocking:
        raise CheckpointError(
            f"{path} was trained with another recipe:\n"
            + "\n".join(blocking)
            + f"\n  For another run: --tag NEW. To go on with its recipe: --cfg {path.with_name('config.yaml')}"
        )


def check_classes(classes: Sequence[str], payload: dict[str, Any], path: Path | str) -> None:
    """Compare the data set's class names with those that a checkpoint was trained on; files without names pass.

    Raises:
        CheckpointError: number, names or order differ, so that labels would mean something else.
    """
    theirs = _own_entry(payload, "classes", CLASSES, path)
    if not theirs or list(theirs) == list(classes):
        return
    if len(theirs) != len(classes):
        what = f"{len(theirs)} classes there, {len(classes)} here"
    else:
        index = next(i for i, (a, b) in enumerate(zip(theirs, classes, strict=True)) if a != b)
        what = f"class {index} is {theirs[index]!r} there and {classes[index]!r} here"
    raise CheckpointError(
        f"the data set's classes are not the ones of {path}: {what}{_numbers_advice(theirs, classes)}"
    )


def _numbers_advice(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Return what to do where one of two lists of classes holds numbers in the place of names."""
    if _are_numbers(theirs) and not _are_numbers(ours):
        return (
            ". It knows its classes by number, as a map file without class folders gives them: use the same archive, "
            "or folders named 0, 1, ... (links to yours will do)"
        )
    if _are_numbers(ours) and not _are_numbers(theirs):
        return ". This data set knows its classes by number: write their names into the map file, in place of numbers"
    return ""


def _are_numbers(classes: Sequence[str]) -> bool:
    return list(classes) == [str(number) for number in range(len(classes))]


def check_held_out(digest: str | None, payload: dict[str, Any], path: Path | str) -> None:
    """Compare the images that DATA.HOLDOUT holds out with those of a checkpoint, where both hold some out.

    Args:
        digest: of the list here.
        payload: the checkpoint's entries.
        path: its file, for messages.

    Raises:
        CheckpointError: the lists differ, so that the results would be on images that were trained on.
    """
    theirs = _own_entry(payload, "held_out", text(100), path)
    if digest and theirs and digest != theirs:
        raise CheckpointError(
            f"the images that DATA.HOLDOUT holds out are not those of {path}: the data, SEED or DATA.HOLDOUT have "
            "changed, and the list holdout.json of its run is not beside it; put it there"
        )


def warn_held_out(digest: str | None, payload: dict[str, Any], path: Path | str) -> None:
    """Warn where a run starts from weights of a training that held out other images; see ``check_held_out``."""
    theirs = _own_entry(payload, "held_out", text(100), path)
    if digest and theirs and digest != theirs:
        logger.warning(
            "%s held out other images: if they come from the same data, it was trained on some that are validated on "
            "here, and the results will look too good; take its SEED and DATA.HOLDOUT",
            path,
        )


def class_columns(
    classes: Sequence[str], metadata: dict[str, Any], path: Path | str, num_classes: int, *, quiet: bool = False
) -> list | None:
    """Return the scores that belong to the data set's classes, found by name; None where all are in the same order.

    A file without class names is taken to be in the order of the data set, which is logged.

    Args:
        classes: the data set's, in the order of the labels.
        metadata: the checkpoint's entries.
        path: its file, for messages.
        num_classes: scores of the model.
        quiet: log nothing, because the same was logged before.

    Raises:
        CheckpointError: a class is not among the checkpoint's, or numbers differ and the file has no names.
    """
    theirs = list(_own_entry(metadata, "classes", CLASSES, path) or ())
    if not theirs:
        _check_assumed_order(classes, path, num_classes)
        if not quiet:
            _log_assumed_order(classes, path)
        return None
    if theirs == list(classes):
        return None
    numbers = {name: number for number, name in enumerate(theirs)}
    if any(name not in numbers for name in classes):
        check_classes(classes, metadata, path)
    if not quiet:
        logger.warning(
            "the data set holds %d of the %d classes of %s, matched by name", len(classes), len(theirs), path
        )
    return [numbers[name] for name in classes]


def _check_assumed_order(classes: Sequence[str], path: Path | str, num_classes: int) -> None:
    if len(classes) != num_classes:
        raise CheckpointError(
            f"the data set has {len(classes)} classes, the model {num_classes}, and {path} holds no class names to "
            "match them by: list the names of the model's classes in a file, one per line in the order of its scores, "
            "and set TEST.CLASS_NAMES FILE (class folders 0, 1, ...: TEST.CLASS_NAMES numbers)"
        )


def _log_assumed_order(classes: Sequence[str], path: Path | str) -> None:
    order = f"{path} holds no class names: label 0 is taken to be {classes[0]!r}, the last {classes[-1]!r}"
    numeric = all(name.isascii() and name.isdigit() for name in classes)
    if numeric and list(classes) != sorted(classes, key=int):
        logger.warning("%s. These numbers are in the order of text; for 2 before 10: DATA.CLASS_ORDER numeric", order)
    else:
        logger.info("%s", order)


def warn_preprocessing(
    config: CfgNode, payload: dict[str, Any], path: Path | str, model: nn.Module | None = None
) -> None:
    """Warn where evaluation preprocesses differently from the checkpoint's training.

    A file that does not say how is compared with what timm records for ``model``, if it is one of timm's.
    """
    theirs = dict(_own_entry(payload, "preprocessing", PREPROCESSING, path) or {})
    if "short_side" not in theirs and max(as_pair(theirs.get("img_size", SMALL + 1))) <= SMALL:
        theirs.pop("crop", None)  # older files hold TEST.CROP, which has no effect on small images
    if not theirs and config.MODEL.TYPE == "timm":
        _warn_of_timm_preprocessing(config, model, path)
    ours = preprocessing(config)
    for key in sorted(set(theirs) & set(ours)):
        if theirs[key] != ours[key]:
            logger.warning(
                "preprocessing %s: %s was trained with %s, this evaluation uses %s", key, path, theirs[key], ours[key]
            )


def _warn_of_timm_preprocessing(config: CfgNode, model: nn.Module | None, path: Path | str) -> None:
    """Warn once if a timm model's released weights expect other images than this evaluation makes."""
    theirs = getattr(model, "pretrained_cfg", None) or {}
    crop = config.TEST.CROP_RATIO if config.TEST.CROP else 1.0
    mean, std = normalisation(config)
    ours = {
        "mean": mean,
        "std": std,
        "crop_pct": crop,
        "interpolation": config.DATA.INTERPOLATION,
    }
    other = [
        f"{key} {theirs[key]} (here {value:.3g})" if isinstance(value, float) else f"{key} {theirs[key]} (here {value})"
        for key, value in ours.items()
        if theirs.get(key) is not None and theirs[key] != value
    ]
    if other:
        logger.warning(
            "timm records other preprocessing for the weights of this model (%s): %s", path, ", ".join(other)
        )


def _own_entry(payload: dict[str, Any], name: str, check: Check, path: Path | str) -> Any:
    """Return an entry of a checkpoint, or None if it has none; other projects may mean something else by the name."""
    value = payload.get(name)
    try:
        if value is not None:
            check(value, name)
    except SchemaFault as fault:
        if "format_version" in payload:
            raise CheckpointError(f"{path}: {fault}") from None
        return None
    return value
