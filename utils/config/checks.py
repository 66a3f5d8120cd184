"""What a configuration may hold: known names, ranges, and how keys have to fit together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from yacs.config import CfgNode

from utils.config.defaults import flatten
from utils.config.facts import DATASETS, FOLDER_DATASETS, odd_batch_problem, published_num_patches

FAST_RESIZES = ("bicubic", "bilinear")  # DATA.INTERPOLATION with DATA.FAST_RESIZE: what torch shrinks without aliasing
STAGE_STRIDE = 8  # the three merges between the four stages halve the map each
AUTO_AUGMENT_POLICIES = ("rand", "augmix", "original", "v0", "3a")  # what timm's policy strings start with

# Known values of text keys; upper and lower case do not matter when they are given.
CHOICES: dict[str, tuple[str, ...]] = {
    "DATA.DATASET": DATASETS,
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "lanczos", "nearest"),
    "DATA.CACHE_MODE": ("no", "part", "full"),
    "DATA.PIPELINE": ("fast", "reference"),
    "DATA.CACHE_DECODED": ("off", "ram"),
    "DATA.BAD_IMAGES": ("error", "skip"),
    "MODEL.TYPE": ("strip_mlp_layer", "timm"),
    "MODEL.DROP_PATH_SCHEDULE": ("constant", "linear"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "TRAIN.LR_SCALING": ("none", "linear", "sqrt"),
    "TRAIN.AMP": ("off", "bf16", "fp16"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "AMP_OPT_LEVEL": ("", "O0", "O1", "O2"),
}

# Intervals of numeric keys, "[" with the end and "(" without it; each entry of a list has to lie inside.
RANGES: dict[str, str] = {
    "DATA.BATCH_SIZE": "[1, inf)",
    "DATA.IMG_SIZE": "[1, inf)",
    "DATA.NUM_WORKERS": "[-1, inf)",
    "DATA.LOADER_TIMEOUT": "[0, inf)",
    "MODEL.NUM_CLASSES": "[1, inf)",
    "MODEL.DROP_RATE": "[0, 1)",
    "MODEL.DROP_PATH_RATE": "[0, 1)",
    "MODEL.ALPHA": "[1, inf)",
    "MODEL.LABEL_SMOOTHING": "[0, 1)",
    "MODEL.STRIP_MLP.PATCH_SIZE": "[1, inf)",
    "MODEL.STRIP_MLP.IN_CHANS": "[1, inf)",
    "MODEL.STRIP_MLP.EMBED_DIM": "[1, inf)",
    "MODEL.STRIP_MLP.LAYERS": "[1, inf)",
    "MODEL.STRIP_MLP.NUM_PATCHES": "[0, inf)",
    "TRAIN.EPOCHS": "[1, inf)",
    "TRAIN.WARMUP_EPOCHS": "[0, inf)",
    "TRAIN.WEIGHT_DECAY": "[0, inf)",
    "TRAIN.BASE_LR": "(0, inf)",
    "TRAIN.WARMUP_LR": "[0, inf)",
    "TRAIN.MIN_LR": "[0, inf)",
    "TRAIN.CLIP_GRAD": "[0, inf)",
    "TRAIN.ACCUMULATION_STEPS": "[0, inf)",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": "[1, inf)",
    "TRAIN.LR_SCHEDULER.DECAY_RATE": "(0, 1]",
    "TRAIN.OPTIMIZER.EPS": "(0, inf)",
    "TRAIN.OPTIMIZER.BETAS": "[0, 1)",
    "TRAIN.OPTIMIZER.MOMENTUM": "[0, 1)",
    "TRAIN.EMA_DECAY": "[0, 1)",
    "TRAIN.SAVE_STEPS": "[0, inf)",
    "TRAIN.SAVE_MINUTES": "[0, inf)",
    "TRAIN.SAVE_KEEP": "[2, inf)",  # with one file, a fault while it is replaced would lose the run
    "TRAIN.MAX_RUN_MINUTES": "[0, inf)",
    "TRAIN.MAX_NONFINITE": "[1, inf)",
    "TRAIN.DIST_TIMEOUT": "[1, inf)",
    "AUG.COLOR_JITTER": "[0, inf)",
    "AUG.REPROB": "[0, 1]",
    "AUG.RECOUNT": "[1, inf)",
    "AUG.MIXUP": "[0, inf)",
    "AUG.CUTMIX": "[0, inf)",
    "AUG.CUTMIX_MINMAX": "(0, 1]",
    "AUG.MIXUP_PROB": "[0, 1]",
    "AUG.MIXUP_SWITCH_PROB": "[0, 1]",
    "AUG.HFLIP": "[0, 1]",
    "AUG.SCALE": "(0, 1]",
    "AUG.RATIO": "(0, inf)",
    "TEST.BATCH_SIZE": "[0, inf)",
    "TEST.INTERVAL": "[1, inf)",
    "SAVE_FREQ": "[1, inf)",
    "PRINT_FREQ": "[1, inf)",
    "SEED": "[0, 2147483648)",
}


@dataclass(frozen=True)
class Problem:
    """One fault of a configuration: the keys that cause it, and what is wrong with which remedy."""

    keys: tuple[str, ...]
    text: str


def check_config(config: CfgNode) -> list[Problem]:
    """Return everything that is wrong with the values of a complete configuration.

    Types and the names of ``CHOICES`` are not looked at: they are refused where a value is read.
    """
    return [
        *_check_ranges(config),
        *_check_data(config),
        *_check_model(config),
        *_check_training(config),
        *_check_augmentation(config),
        *_check_files(config),
    ]


def _check_ranges(config: CfgNode) -> Iterator[Problem]:
    values = flatten(config)
    for key, interval in RANGES.items():
        value = values[key]
        numbers = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        if not all(_inside(number, interval) for number in numbers):
            yield Problem((key,), f"{key} is {value}; allowed: {interval}")


def _inside(number: float, interval: str) -> bool:
    """Whether ``number`` lies in an interval such as ``[0, 1)``; NaN lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below


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


def _check_model(config: CfgNode) -> Iterator[Problem]:
    model, strip = config.MODEL, config.MODEL.STRIP_MLP
    if model.TYPE == "timm":
        if not model.TIMM_NAME:
            yield Problem(("MODEL.TYPE", "MODEL.TIMM_NAME"), "MODEL.TYPE timm needs a model's name in MODEL.TIMM_NAME")
        return
    side = strip.PATCH_SIZE * STAGE_STRIDE
    if side > 0 and config.DATA.IMG_SIZE % side:
        lower = config.DATA.IMG_SIZE // side * side
        sizes = f"{lower} or {lower + side}" if lower else str(side)
        yield Problem(
            ("DATA.IMG_SIZE",),
            f"DATA.IMG_SIZE is {config.DATA.IMG_SIZE}, not a multiple of {side} (patch size {strip.PATCH_SIZE} times "
            f"{STAGE_STRIDE}); take {sizes}",
        )
    patches = strip.NUM_PATCHES or published_num_patches(strip.EMBED_DIM)
    if strip.EMBED_DIM % (2 * patches):
        yield Problem(
            ("MODEL.STRIP_MLP.EMBED_DIM", "MODEL.STRIP_MLP.NUM_PATCHES"),
            f"MODEL.STRIP_MLP.EMBED_DIM is {strip.EMBED_DIM}; half of it has to divide into {patches} channel patches, "
            f"so take a multiple of {2 * patches}",
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


def _check_augmentation(config: CfgNode) -> Iterator[Problem]:
    aug = config.AUG
    odd_batch = odd_batch_problem(config)
    if odd_batch:
        yield Problem(("DATA.BATCH_SIZE", "AUG.MIXUP", "AUG.CUTMIX"), odd_batch)
    policy = aug.AUTO_AUGMENT
    if policy not in ("", "none") and not policy.startswith(AUTO_AUGMENT_POLICIES):
        yield Problem(
            ("AUG.AUTO_AUGMENT",),
            f"AUG.AUTO_AUGMENT is {policy!r}; a policy starts with {', '.join(AUTO_AUGMENT_POLICIES)}; none = off",
        )
    for key in ("SCALE", "RATIO", "CUTMIX_MINMAX"):
        low, high = aug[key] or (0.0, 0.0)
        if math.isfinite(low) and low > high:
            yield Problem((f"AUG.{key}",), f"AUG.{key} is {aug[key]}: the first number is larger than the second")


def _check_files(config: CfgNode) -> Iterator[Problem]:
    for key, name in (("MODEL.NAME", config.MODEL.NAME), ("TAG", config.TAG)):
        if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
            yield Problem((key,), f"{key} is {name!r}; it names a folder, so it must not be empty or hold a slash")
    if config.MODEL.RESUME and config.MODEL.PRETRAINED:
        yield Problem(
            ("MODEL.RESUME", "MODEL.PRETRAINED"),
            "MODEL.RESUME (--resume) continues a run, MODEL.PRETRAINED (--pretrained) starts one from other weights; "
            "give one of them",
        )
    if config.DATA.ZIP_MODE and config.DATA.DATASET not in FOLDER_DATASETS:
        yield Problem(
            ("DATA.ZIP_MODE", "DATA.DATASET"),
            f"DATA.ZIP_MODE (--zip) reads image archives, but DATA.DATASET is {config.DATA.DATASET}; archives are "
            f"possible with {', '.join(FOLDER_DATASETS)}",
        )
