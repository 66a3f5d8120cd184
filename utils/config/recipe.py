"""How a configuration differs from the published recipe or from another run, and which of its keys do nothing."""

from collections.abc import Callable
from typing import Any

from yacs.config import CfgNode

from utils.config.defaults import default_config, flatten
from utils.config.facts import mixes

# Keys that the weights at the end of training do not depend on: places, names, how often something is saved or shown.
NEUTRAL_KEYS = frozenset(
    {
        "DATA.DATA_PATH",
        "DATA.ZIP_MODE",
        "DATA.CACHE_MODE",
        "DATA.PIN_MEMORY",
        "DATA.NUM_WORKERS",
        "DATA.DOWNLOAD",
        "DATA.VAL_CACHE",
        "DATA.CACHE_DECODED",
        "DATA.LOADER_TIMEOUT",
        "MODEL.NAME",
        "MODEL.PRETRAINED",
        "MODEL.RESUME",
        "TRAIN.AUTO_RESUME",
        "TRAIN.USE_CHECKPOINT",
        "TRAIN.SAVE_STEPS",
        "TRAIN.SAVE_MINUTES",
        "TRAIN.SAVE_KEEP",
        "TRAIN.MAX_RUN_MINUTES",
        "TRAIN.MAX_NONFINITE",
        "TRAIN.DIST_TIMEOUT",
        "TEST.CROP",
        "TEST.BATCH_SIZE",
        "TEST.INTERVAL",
        "AMP_OPT_LEVEL",
        "OUTPUT",
        "TAG",
        "SAVE_FREQ",
        "PRINT_FREQ",
        "EVAL_MODE",
        "THROUGHPUT_MODE",
    }
)

# Keys that a resumed run may change, but that the accuracy at the end depends on.
RESULT_KEYS = ("MODEL.PRETRAINED", "TEST.CROP")

# Published (EMBED_DIM, LAYERS): Strip-MLP-T*, T, S, B.
PUBLISHED_VARIANTS = ((80, [2, 2, 6, 2]), (80, [2, 2, 12, 2]), (96, [2, 2, 18, 2]), (112, [2, 2, 18, 2]))
PUBLISHED_CLASSES = {
    "imagenet": 1000,
    "imagenet-1k": 1000,
    "101_ObjectCategories": 101,
    "caltech101": 101,
    "CIFAR10": 10,
    "CIFAR100": 100,
}
PUBLISHED_BATCHES = (64, 128)  # the published default and the size in the published commands
VARIANT_KEYS = ("MODEL.STRIP_MLP.EMBED_DIM", "MODEL.STRIP_MLP.LAYERS")

_STRIP_KEYS = (
    "MODEL.ALPHA",
    "MODEL.DROP_PATH_SCHEDULE",
    "MODEL.STRIP_MLP.PATCH_SIZE",
    "MODEL.STRIP_MLP.EMBED_DIM",
    "MODEL.STRIP_MLP.LAYERS",
    "MODEL.STRIP_MLP.NUM_PATCHES",
)

# (keys, when they do nothing, why)
WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], Callable[[CfgNode], bool], str], ...] = (
    (("MODEL.PATCH_NORM",), lambda c: True, "the published network has no norm after the patch embedding"),
    (("MODEL.DROP_RATE",), lambda c: not c.MODEL.DROP, "MODEL.DROP is False"),
    (("MODEL.TIMM_NAME",), lambda c: c.MODEL.TYPE != "timm", "MODEL.TYPE is not timm"),
    (_STRIP_KEYS, lambda c: c.MODEL.TYPE == "timm", "MODEL.TYPE is timm"),
    (("DATA.CACHE_MODE",), lambda c: not c.DATA.ZIP_MODE, "DATA.ZIP_MODE is False"),
    (("AUG.COLOR_JITTER",), lambda c: c.AUG.AUTO_AUGMENT not in ("", "none"), "AUG.AUTO_AUGMENT takes its place"),
    (("AUG.REMODE", "AUG.RECOUNT"), lambda c: c.AUG.REPROB == 0, "AUG.REPROB is 0"),
    (("AUG.MIXUP_PROB", "AUG.MIXUP_SWITCH_PROB", "AUG.MIXUP_MODE"), lambda c: not mixes(c), "mixup and cutmix are off"),
    (("TRAIN.WARMUP_LR",), lambda c: c.TRAIN.WARMUP_EPOCHS == 0, "TRAIN.WARMUP_EPOCHS is 0"),
    (
        ("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", "TRAIN.LR_SCHEDULER.DECAY_RATE"),
        lambda c: c.TRAIN.LR_SCHEDULER.NAME != "step",
        "TRAIN.LR_SCHEDULER.NAME is not step",
    ),
    (("TRAIN.MIN_LR",), lambda c: c.TRAIN.LR_SCHEDULER.NAME != "cosine", "TRAIN.LR_SCHEDULER.NAME is not cosine"),
    (
        ("TRAIN.LR_SCHEDULER.WARMUP_PREFIX",),
        lambda c: c.TRAIN.LR_SCHEDULER.NAME == "linear",
        "the linear schedule always decays from the end of warm-up",
    ),
    (("TRAIN.OPTIMIZER.EPS", "TRAIN.OPTIMIZER.BETAS"), lambda c: c.TRAIN.OPTIMIZER.NAME == "sgd", "they are AdamW's"),
    (("TRAIN.OPTIMIZER.MOMENTUM",), lambda c: c.TRAIN.OPTIMIZER.NAME == "adamw", "it is SGD's"),
    (("TRAIN.EMA_WARMUP",), lambda c: c.TRAIN.EMA_DECAY == 0, "TRAIN.EMA_DECAY is 0"),
)


def recipe_differences(reference: CfgNode, config: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Return the keys that change the trained weights and in which two configurations differ.

    Keys that do nothing in ``config`` (``TRAIN.OPTIMIZER.MOMENTUM`` under AdamW, for example) are left out.

    Args:
        reference: the configuration to compare with, such as the one that a checkpoint holds.
        config: the configuration of this run.

    Returns:
        ``{'SECTION.KEY': (value in reference, value in config)}`` in the order of the tree.
    """
    theirs, ours = flatten(reference), flatten(config)
    idle = _keys_without_effect(config)
    differences = {
        key: (theirs[key], ours[key])
        for key in ours
        if key not in NEUTRAL_KEYS and key not in idle and theirs[key] != ours[key]
    }
    steps = differences.get("TRAIN.ACCUMULATION_STEPS", ())
    if set(steps) == {0, 1}:  # two ways to say "no accumulation"
        del differences["TRAIN.ACCUMULATION_STEPS"]
    return differences


def recipe_deviations(config: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which a run deviates from the published recipe, as ``{key: (published, here)}``.

    Each published variant, data set and batch size counts as published. ``DATA.PIPELINE`` is no deviation: both
    pipelines give the same pixels, and their random erasing has the same distribution.
    """
    deviations = recipe_differences(default_config(), config)
    published, ours = flatten(default_config()), flatten(config)
    for key in RESULT_KEYS:
        if ours[key] != published[key]:
            deviations[key] = (published[key], ours[key])
    for key in ("DATA.PIPELINE", *VARIANT_KEYS):
        deviations.pop(key, None)
    if config.DATA.BATCH_SIZE in PUBLISHED_BATCHES:
        deviations.pop("DATA.BATCH_SIZE", None)
    deviations.pop("DATA.DATASET", None)
    if config.DATA.DATASET not in PUBLISHED_CLASSES:
        deviations.pop("MODEL.NUM_CLASSES", None)  # follows from the data set
        deviations["DATA.DATASET"] = (", ".join(PUBLISHED_CLASSES), config.DATA.DATASET)
    elif config.MODEL.NUM_CLASSES == PUBLISHED_CLASSES[config.DATA.DATASET]:
        deviations.pop("MODEL.NUM_CLASSES", None)
    deviations.update(_variant_deviations(config))
    return {key: deviations[key] for key in ours if key in deviations}


def config_notices(config: CfgNode) -> list[str]:
    """Return sentences for the log: settings that were translated, and changed keys that do nothing."""
    notices = []
    if config.AMP_OPT_LEVEL:
        notices.append(
            f"AMP_OPT_LEVEL {config.AMP_OPT_LEVEL} (--amp-opt-level) is the published name of a precision; "
            f"it is read as TRAIN.AMP {config.TRAIN.AMP} (--amp {config.TRAIN.AMP})"
        )
    published, ours = flatten(default_config()), flatten(config)
    for keys, applies, reason in WITHOUT_EFFECT:
        if applies(config):
            notices.extend(
                f"{key} is {ours[key]}, which has no effect: {reason}"
                for key in keys
                if ours[key] != published[key] and key not in VARIANT_KEYS
            )
    return notices


def _keys_without_effect(config: CfgNode) -> set[str]:
    return {key for keys, applies, _ in WITHOUT_EFFECT if applies(config) for key in keys}


def _variant_deviations(config: CfgNode) -> dict[str, tuple[str, Any]]:
    """Compare EMBED_DIM and LAYERS with the four published pairs."""
    if config.MODEL.TYPE == "timm":
        return {}
    width, depths = config.MODEL.STRIP_MLP.EMBED_DIM, list(config.MODEL.STRIP_MLP.LAYERS)
    found = {}
    widths = sorted({w for w, _ in PUBLISHED_VARIANTS})
    if width not in widths:
        found[VARIANT_KEYS[0]] = (" or ".join(map(str, widths)), width)
    allowed = [d for w, d in PUBLISHED_VARIANTS if w == width or width not in widths]
    if depths not in allowed:
        texts = dict.fromkeys(map(str, allowed))  # without repetitions, in the published order
        found[VARIANT_KEYS[1]] = (" or ".join(texts), depths)
    return found
