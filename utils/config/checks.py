"""What is wrong with the values of a configuration: ranges, and keys that do not fit together."""

import math
import os
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass

from yacs.config import CfgNode

from utils.config.facts import FILE_DATASETS, FOLDER_DATASETS, as_pair, channel_values, odd_batch_problem, trains
from utils.config.keys import KEYS, flatten, only_trains, value_of
from utils.config.policy import policy_problem
from utils.config.values import read_arguments, read_duration

FAST_RESIZES = ("bicubic", "bilinear")  # DATA.INTERPOLATION with DATA.FAST_RESIZE: what torch shrinks without aliasing
STAGE_STRIDE = 8  # the three merges between the four stages halve the map each
NAME_BYTES, PATH_BYTES = 255, 4095  # what file systems allow


@dataclass(frozen=True)
class Problem:
    """One problem of a configuration: the keys that cause it, and what is wrong with the remedy."""

    keys: tuple[str, ...]
    text: str


def check_config(config: CfgNode) -> list[Problem]:
    """Return everything that is wrong with the values of a complete configuration.

    Types and names are not checked here, but where a value is read. What only training reads is not checked where the
    configuration is for something else.
    """
    checks = [_check_ranges, _check_data, _check_holdout, _check_channels, _check_model, _check_files]
    if trains(config):
        checks += [_check_training, _check_balance, _check_augmentation]
    return [problem for check in checks for problem in check(config)]


def _check_ranges(config: CfgNode) -> Iterator[Problem]:
    for name, value in flatten(config).items():
        if not KEYS[name].in_range(value) and (trains(config) or not only_trains(name)):
            yield Problem((name,), f"{name} is {value}; allowed: {KEYS[name].allowed}")


def _check_data(config: CfgNode) -> Iterator[Problem]:
    data = config.DATA
    if data.FAST_RESIZE and (data.PIPELINE != "fast" or data.INTERPOLATION not in FAST_RESIZES):
        yield Problem(
            ("DATA.FAST_RESIZE", "DATA.PIPELINE", "DATA.INTERPOLATION"),
            f"DATA.FAST_RESIZE needs DATA.PIPELINE fast and DATA.INTERPOLATION {' or '.join(FAST_RESIZES)}; got "
            f"{data.PIPELINE} and {data.INTERPOLATION}",
        )
    if data.VAL_CACHE and data.PIPELINE != "fast":
        yield Problem(
            ("DATA.VAL_CACHE", "DATA.PIPELINE"),
            f"DATA.VAL_CACHE holds uint8 images, which DATA.PIPELINE {data.PIPELINE} does not make; take fast",
        )
    if data.PIPELINE != "fast" and len(set(as_pair(data.IMG_SIZE))) > 1:
        yield Problem(
            ("DATA.IMG_SIZE", "DATA.PIPELINE"),
            f"DATA.IMG_SIZE is {data.IMG_SIZE}, but DATA.PIPELINE {data.PIPELINE}, as published, makes squares; take "
            "fast",
        )


def _check_holdout(config: CfgNode) -> Iterator[Problem]:
    data = config.DATA
    if data.HOLDOUT and (data.DATASET not in FILE_DATASETS or data.ZIP_MODE):
        what = "DATA.ZIP_MODE (--zip) reads archives" if data.ZIP_MODE else f"{data.DATASET} has a validation set"
        yield Problem(
            ("DATA.HOLDOUT", "DATA.DATASET", "DATA.ZIP_MODE"),
            f"DATA.HOLDOUT divides image folders and CSV files, but {what}; set DATA.HOLDOUT 0",
        )
    if data.TRAIN_SHARE < 1 and (data.DATASET == "shards" or data.DATASET.startswith("timm:") or data.ZIP_MODE):
        what = "DATA.ZIP_MODE (--zip) reads archives" if data.ZIP_MODE else f"DATA.DATASET is {data.DATASET}"
        yield Problem(
            ("DATA.TRAIN_SHARE", "DATA.DATASET", "DATA.ZIP_MODE"),
            f"DATA.TRAIN_SHARE takes a part of folders, CSV files, CIFAR and digits, but {what}; set it to 1",
        )


def _check_balance(config: CfgNode) -> Iterator[Problem]:
    data, train = config.DATA, config.TRAIN
    if train.CLASS_WEIGHTS == "balanced" and data.SAMPLER == "balanced":
        yield Problem(
            ("TRAIN.CLASS_WEIGHTS", "DATA.SAMPLER"),
            "TRAIN.CLASS_WEIGHTS and DATA.SAMPLER are both balanced, which balances the classes twice; take one",
        )
    if train.CLASS_WEIGHTS == "balanced" and train.LOSS.NAME == "bce":
        yield Problem(
            ("TRAIN.CLASS_WEIGHTS", "TRAIN.LOSS.NAME"),
            "TRAIN.CLASS_WEIGHTS is defined for cross-entropy, but TRAIN.LOSS.NAME is bce; take DATA.SAMPLER balanced",
        )
    if data.SAMPLER == "balanced" and config.AUG.REPEATS > 1:
        yield Problem(
            ("DATA.SAMPLER", "AUG.REPEATS"),
            f"DATA.SAMPLER balanced repeats images of small classes itself; set AUG.REPEATS to 1, it is "
            f"{config.AUG.REPEATS}",
        )


def _check_channels(config: CfgNode) -> Iterator[Problem]:
    channels = config.MODEL.STRIP_MLP.IN_CHANS
    for key, values in channel_values(config).items():
        if len(values) not in (1, channels):
            yield Problem(
                (key, "MODEL.STRIP_MLP.IN_CHANS"),
                f"{key} has {len(values)} values, but MODEL.STRIP_MLP.IN_CHANS is {channels}; give one value, or one "
                "for each channel",
            )
    if channels in (1, 3):
        return
    if config.DATA.PIPELINE != "fast":
        yield Problem(
            ("DATA.PIPELINE", "MODEL.STRIP_MLP.IN_CHANS"),
            f"DATA.PIPELINE {config.DATA.PIPELINE} takes RGB and grey images, but MODEL.STRIP_MLP.IN_CHANS is "
            f"{channels}; take fast",
        )


def _check_model(config: CfgNode) -> Iterator[Problem]:
    model, strip = config.MODEL, config.MODEL.STRIP_MLP
    if model.TYPE == "timm":
        if not model.TIMM_NAME:
            yield Problem(("MODEL.TYPE", "MODEL.TIMM_NAME"), "MODEL.TYPE timm needs a model's name in MODEL.TIMM_NAME")
        return
    side = strip.PATCH_SIZE * STAGE_STRIDE
    for length in dict.fromkeys(as_pair(config.DATA.IMG_SIZE)):
        if side > 0 and length % side:
            lower = length // side * side
            sizes = f"{lower} or {lower + side}" if lower else str(side)
            yield Problem(
                ("DATA.IMG_SIZE",),
                f"DATA.IMG_SIZE is {length}, not a multiple of {side} (patch size {strip.PATCH_SIZE} times "
                f"{STAGE_STRIDE}); take {sizes}",
            )
    patches = strip.NUM_PATCHES or 4  # published: 2 where 80 divides the width, which 4 suits too, else 4
    if strip.EMBED_DIM % (2 * patches) and strip.TOKEN_MIXING != "lsmm":
        yield Problem(
            ("MODEL.STRIP_MLP.EMBED_DIM", "MODEL.STRIP_MLP.NUM_PATCHES"),
            f"MODEL.STRIP_MLP.EMBED_DIM is {strip.EMBED_DIM}; half of it has to divide into {patches} channel patches, "
            f"so take a multiple of {2 * patches}",
        )
    if strip.STRIP_WIDTH % 2 == 0:
        width = strip.STRIP_WIDTH
        yield Problem(
            ("MODEL.STRIP_MLP.STRIP_WIDTH",),
            f"MODEL.STRIP_MLP.STRIP_WIDTH is {width}, but a strip is a row and as many on each side; take {width + 1}",
        )


def _check_training(config: CfgNode) -> Iterator[Problem]:
    train = config.TRAIN
    if train.EPOCHS <= train.WARMUP_EPOCHS:
        yield Problem(
            ("TRAIN.EPOCHS", "TRAIN.WARMUP_EPOCHS"),
            f"TRAIN.EPOCHS is {train.EPOCHS} and has to be larger than TRAIN.WARMUP_EPOCHS, which is "
            f"{train.WARMUP_EPOCHS}; shorten the warm-up too",
        )
    for key in ("WARMUP_LR", "MIN_LR"):
        if train[key] > train.BASE_LR:
            yield Problem(
                (f"TRAIN.{key}", "TRAIN.BASE_LR"),
                f"TRAIN.{key} is {train[key]:g}, larger than TRAIN.BASE_LR, which is {train.BASE_LR:g}",
            )
    if (
        train.COMPILE
        and train.COMPILE_MODE == "reduce-overhead"
        and (train.ACCUMULATION_STEPS > 1 or train.GLOBAL_BATCH)
    ):
        yield Problem(
            ("TRAIN.COMPILE_MODE", "TRAIN.ACCUMULATION_STEPS", "TRAIN.GLOBAL_BATCH"),
            "TRAIN.COMPILE_MODE reduce-overhead leaves gradients in memory that the next micro-batch overwrites; take "
            "TRAIN.COMPILE_MODE default, or TRAIN.ACCUMULATION_STEPS 1 and TRAIN.GLOBAL_BATCH 0",
        )
    try:
        read_duration(train.TIME_BUDGET)
    except ValueError as error:
        yield Problem(("TRAIN.TIME_BUDGET",), f"TRAIN.TIME_BUDGET is {error}")
    try:
        read_arguments(train.OPTIMIZER.OPTIONS)
    except ValueError as error:
        yield Problem(("TRAIN.OPTIMIZER.OPTIONS",), f"TRAIN.OPTIMIZER.OPTIONS: {error}")
    distill = train.DISTILL
    if distill.KIND != "none" and not (distill.TEACHER or distill.TIMM_NAME):
        yield Problem(
            ("TRAIN.DISTILL.KIND",),
            f"TRAIN.DISTILL.KIND is {distill.KIND}, but there is no teacher: give its checkpoint in "
            "TRAIN.DISTILL.TEACHER, or its name in timm in TRAIN.DISTILL.TIMM_NAME",
        )


def _check_augmentation(config: CfgNode) -> Iterator[Problem]:
    aug, channels = config.AUG, config.MODEL.STRIP_MLP.IN_CHANS
    if channels not in (1, 3) and (aug.AUTO_AUGMENT not in ("", "none") or aug.COLOR_JITTER > 0):
        yield Problem(
            ("AUG.AUTO_AUGMENT", "AUG.COLOR_JITTER", "MODEL.STRIP_MLP.IN_CHANS"),
            "AUG.AUTO_AUGMENT and AUG.COLOR_JITTER change colours and brightness of RGB and grey images, but "
            f"MODEL.STRIP_MLP.IN_CHANS is {channels}; set AUG.AUTO_AUGMENT none and AUG.COLOR_JITTER 0",
        )
    odd_batch = odd_batch_problem(config)
    if odd_batch:
        yield Problem(("DATA.BATCH_SIZE", "AUG.MIXUP", "AUG.CUTMIX"), odd_batch)
    policy = aug.AUTO_AUGMENT
    problem = policy_problem(policy) if policy not in ("", "none") else ""
    if problem:
        yield Problem(("AUG.AUTO_AUGMENT",), f"AUG.AUTO_AUGMENT is {reprlib.repr(policy)}: {problem}; none = off")
    if policy not in ("", "none") and config.DATA.INTERPOLATION == "lanczos":
        yield Problem(
            ("DATA.INTERPOLATION", "AUG.AUTO_AUGMENT"),
            "DATA.INTERPOLATION is lanczos, with which the operations of AUG.AUTO_AUGMENT cannot rotate or shear; take "
            "bicubic, bilinear or nearest, or AUG.AUTO_AUGMENT none",
        )
    if aug.MIXUP_OFF_EPOCHS > config.TRAIN.EPOCHS:
        yield Problem(
            ("AUG.MIXUP_OFF_EPOCHS", "TRAIN.EPOCHS"),
            f"AUG.MIXUP_OFF_EPOCHS is {aug.MIXUP_OFF_EPOCHS}, more than TRAIN.EPOCHS, which is {config.TRAIN.EPOCHS}",
        )
    for key in ("SCALE", "RATIO", "CUTMIX_MINMAX"):
        low, high = aug[key] or (0.0, 0.0)
        if math.isfinite(low) and low > high:
            yield Problem((f"AUG.{key}",), f"AUG.{key} is {aug[key]}: the first number is larger than the second")


def _check_files(config: CfgNode) -> Iterator[Problem]:
    for key, name in (("MODEL.NAME", config.MODEL.NAME), ("TAG", config.TAG)):
        if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
            yield Problem(
                (key,), f"{key} is {reprlib.repr(name)}; it names a folder, so it must not be empty or hold a slash"
            )
        elif not name.isprintable() or len(name.encode()) > NAME_BYTES:
            yield Problem(
                (key,),
                f"{key} is {reprlib.repr(name)}; it names a folder, so it must have at most {NAME_BYTES} bytes and no "
                "control characters",
            )
    for key in (key for key in KEYS.values() if key.is_path):
        problem = _path_problem(value_of(config, key.name))
        if problem:
            yield Problem((key.name,), f"{key.name} is {reprlib.repr(value_of(config, key.name))}: {problem}")
    if config.MODEL.RESUME and config.MODEL.PRETRAINED:
        yield Problem(
            ("MODEL.RESUME", "MODEL.PRETRAINED"),
            "MODEL.RESUME (--resume) continues a run, MODEL.PRETRAINED (--pretrained) starts one from other weights; "
            "give one of them",
        )
    if config.DATA.CLASS_ORDER == "file" and "://" in config.DATA.DATA_PATH:
        yield Problem(
            ("DATA.CLASS_ORDER", "DATA.DATA_PATH"),
            "DATA.CLASS_ORDER file reads classes.txt from a folder, but DATA.DATA_PATH is an address; take text or "
            "numeric",
        )
    if config.DATA.ZIP_MODE and config.DATA.DATASET not in FOLDER_DATASETS:
        yield Problem(
            ("DATA.ZIP_MODE", "DATA.DATASET"),
            f"DATA.ZIP_MODE (--zip) reads image archives, but DATA.DATASET is {config.DATA.DATASET}; archives are "
            f"possible with {', '.join(FOLDER_DATASETS)}",
        )


def _path_problem(text: str) -> str:
    """Return why a path or address cannot be one, or an empty text."""
    if "://" in text:
        if re.fullmatch(r"[a-z]+://[!-~]*", text, re.IGNORECASE):
            return ""
        return "an address must not hold spaces or characters outside ASCII; write a space as %20"
    encoded = os.fsencode(text)
    if b"\0" in encoded:
        return "a path must not hold null bytes"
    if len(encoded) > PATH_BYTES or any(len(part) > NAME_BYTES for part in encoded.split(b"/")):
        return f"a path has at most {PATH_BYTES} bytes, each name in it at most {NAME_BYTES}"
    return ""
