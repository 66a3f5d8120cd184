"""The teacher of a distillation, from a checkpoint of this project, another file, or timm."""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from utils.checkpoint.archive import tensor_crc
from utils.checkpoint.files import load_checkpoint, payload_digest, resolve_source
from utils.checkpoint.resume import check_classes, class_names, preprocessing
from utils.checkpoint.weights import load_weights
from utils.config import as_pair, load_stored_config
from utils.errors import CheckpointError, RunError, one_line
from utils.runtime import once_per_machine, streams_restored
from utils.training import Teacher

logger = logging.getLogger(__name__)

Remap = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def load_teacher(
    config: CfgNode,
    device: torch.device,
    metadata: dict[str, Any],
    *,
    build: Callable[[CfgNode, int], nn.Module],
    remap: Remap,
) -> Teacher | None:
    """Load the teacher of ``TRAIN.DISTILL``; None without distillation. The random streams are left alone. Collective.

    A checkpoint of this project says itself what network it holds. Any other file needs ``TRAIN.DISTILL.TIMM_NAME``.

    Args:
        config: this run's config.
        device: where it computes.
        metadata: this run's ``checkpoint_metadata``: its classes and its preprocessing are read.
        build: makes the model of a config and a number of classes (``models.build_model``).
        remap: turns published names into the model's (``models.from_published``).

    Raises:
        FileNotFoundError, ValueError, CheckpointError, RunError: the teacher cannot be had, or is for other classes.
    """
    distill = config.TRAIN.DISTILL
    if distill.KIND == "none":
        return None
    path = _teacher_file(distill.TEACHER)
    with streams_restored():
        if distill.TIMM_NAME:
            model, theirs = _from_timm(config, path, remap, metadata)
        else:
            model, theirs = _from_checkpoint(path, metadata["classes"], build, remap)
    _check_count(getattr(model, "num_classes", None), len(metadata["classes"]), path or distill.TIMM_NAME)
    ours = metadata["preprocessing"]
    _check_channels(len(theirs["mean"]), len(ours["mean"]), path)
    digest = payload_digest(dict(model.state_dict()), tensor_crc)
    logger.info("teacher: %s, weights %s, %s", path or distill.TIMM_NAME, digest[:24], distill.KIND)
    if theirs["img_size"] and as_pair(theirs["img_size"]) != as_pair(ours["img_size"]):
        logger.info("the teacher sees the images at %s instead of %s pixels", theirs["img_size"], ours["img_size"])
    return Teacher(model.to(device), config, digest=digest, ours=ours, theirs=theirs)


def _teacher_file(source: str) -> Path | None:
    """Return the local file of ``TRAIN.DISTILL.TEACHER``, None where it is empty."""
    try:
        return resolve_source(source) if source else None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"TRAIN.DISTILL.TEACHER: {error}") from None


def _check_channels(theirs: int, ours: int, path: Path | None) -> None:
    """Raise a ValueError unless the teacher takes the images of this run, or grey ones in the place of RGB."""
    if theirs != ours and (theirs, ours) != (3, 1):
        raise ValueError(
            f"the teacher {path} takes images of {theirs} channel(s), this run has {ours} (MODEL.STRIP_MLP.IN_CHANS); "
            "it must take as many, or three where the run has one"
        )


def _check_count(count: int | None, wanted: int, name: object) -> None:
    """Raise a ValueError if the teacher is known to be for another number of classes."""
    if count not in (None, wanted):
        raise ValueError(
            f"the teacher {name} knows {count} classes, this run has {wanted}; it must have been trained on the same "
            "classes"
        )


def _from_checkpoint(
    path: Path, classes: list[str], build: Callable[[CfgNode, int], nn.Module], remap: Remap
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of one of our checkpoints, its averaged weights if there are any, and its preprocessing."""
    text = load_checkpoint(path, map_location="meta").get("config")
    if not isinstance(text, str):
        raise CheckpointError(
            f"{path} does not say what network it holds; name it in TRAIN.DISTILL.TIMM_NAME, such as strip_mlp_base"
        )
    config, _ = load_stored_config(text, str(path), overrides={"EVAL_MODE": True})
    model = build(config, len(class_names(str(path))))
    _, metadata = load_weights(model, str(path), remap=remap, prefer_ema=True)
    check_classes(classes, metadata, path)
    return model, {**preprocessing(config), **metadata.get("preprocessing", {})}  # old files say less


def _from_timm(
    config: CfgNode, path: Path | None, remap: Remap, metadata: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network of timm with the weights of a file, or without one its released weights; and its preprocessing.

    Where its input size is not fixed, it sees the images at the size of this run.
    """
    name, num_classes = config.TRAIN.DISTILL.TIMM_NAME, len(metadata["classes"])
    options: dict[str, Any] = {"in_chans": config.MODEL.STRIP_MLP.IN_CHANS}
    options |= {"pretrained": True} if path is None else {"num_classes": num_classes}

    def create() -> nn.Module:
        try:
            return timm.create_model(name, **options)
        except Exception as error:  # whatever timm or the network raises
            raise RunError(
                f"TRAIN.DISTILL.TIMM_NAME {name}: timm cannot make this teacher: {one_line(error)}; without access to "
                "the network, give the file of its weights in TRAIN.DISTILL.TEACHER"
            ) from error

    if path is None:
        with suppress(RuntimeError):  # an unknown tag, which ``create`` reports
            known = timm.get_pretrained_cfg(name)
            _check_count(getattr(known, "num_classes", None), num_classes, name)  # before a download
        once_per_machine(create, what=f"fetching the teacher {name}")  # one process downloads, the others find the file
    model = create()
    if path is not None:
        load_weights(model, str(path), remap=remap, prefer_ema=True)
    known = model.pretrained_cfg
    size = tuple(known["input_size"][1:]) if known["fixed_input_size"] else None
    is_rgb = config.MODEL.STRIP_MLP.IN_CHANS == len(known["mean"])  # timm knows no statistics of other images
    scale = known if is_rgb else metadata["preprocessing"]
    return model, {"mean": scale["mean"], "std": scale["std"], "img_size": size}
