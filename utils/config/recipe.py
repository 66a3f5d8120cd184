"""How a configuration differs from the published recipe or from another run, and which keys have no effect in it."""

from typing import Any

from yacs.config import CfgNode

from utils.config.facts import mixes
from utils.config.keys import KEYS, default_config, flatten
from utils.config.policy import clipped_magnitude

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


def recipe_differences(reference: CfgNode, config: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Return the keys that change the trained weights and in which two configurations differ.

    Keys without effect in ``config`` (``TRAIN.OPTIMIZER.MOMENTUM`` under AdamW, for example) are left out.

    Args:
        reference: the configuration to compare with, such as the one that a checkpoint holds.
        config: the configuration of this run.

    Returns:
        ``{'SECTION.KEY': (value in reference, value in config)}`` in the order of the tree.
    """
    theirs, ours = flatten(reference), flatten(config)
    differences = {
        name: (theirs[name], ours[name])
        for name, key in KEYS.items()
        if key.affects == "weights" and not key.idle(config) and theirs[name] != ours[name]
    }
    batches = differences.get("TRAIN.ACCUMULATION_STEPS", ())
    if set(batches) == {0, 1}:  # two ways to say "no accumulation"
        del differences["TRAIN.ACCUMULATION_STEPS"]
    return differences


def config_differences(reference: CfgNode, config: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Return all keys but paths in which two configurations differ, as ``{key: (in reference, in config)}``."""
    theirs, ours = flatten(reference), flatten(config)
    return {n: (theirs[n], ours[n]) for n, key in KEYS.items() if not key.is_path and theirs[n] != ours[n]}


def recipe_deviations(config: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which a run deviates from the published recipe, as ``{key: (published, here)}``.

    Each published variant, data set and batch size counts as published. ``DATA.PIPELINE`` is not a deviation: both
    pipelines give the same pixels, and their random erasing has the same distribution.
    """
    ours, data_set = flatten(config), config.DATA.DATASET
    as_published = {"DATA.PIPELINE", "DATA.DATASET", *VARIANT_KEYS}
    if config.DATA.BATCH_SIZE in PUBLISHED_BATCHES:
        as_published.add("DATA.BATCH_SIZE")
    if config.MODEL.NUM_CLASSES == PUBLISHED_CLASSES.get(data_set, config.MODEL.NUM_CLASSES):
        as_published.add("MODEL.NUM_CLASSES")  # where the data set is another, they follow from it
    deviations = recipe_differences(default_config(), config) | {
        name: (key.default, ours[name])
        for name, key in KEYS.items()
        if key.affects == "result" and ours[name] != key.default
    }
    deviations = {name: pair for name, pair in deviations.items() if name not in as_published}
    if data_set not in PUBLISHED_CLASSES:
        deviations["DATA.DATASET"] = (", ".join(PUBLISHED_CLASSES), data_set)
    deviations |= _variant_deviations(config)
    return {name: deviations[name] for name in KEYS if name in deviations}


def config_notices(config: CfgNode) -> list[str]:
    """Return sentences for the log: settings that were translated, and changed keys without effect."""
    notices = []
    if config.AMP_OPT_LEVEL:
        notices.append(
            f"AMP_OPT_LEVEL {config.AMP_OPT_LEVEL} (--amp-opt-level) is the published name of a precision; "
            f"it is read as TRAIN.AMP {config.TRAIN.AMP} (--amp {config.TRAIN.AMP})"
        )
    clipped = clipped_magnitude(config.AUG.AUTO_AUGMENT)
    if clipped:
        notices.append(f"AUG.AUTO_AUGMENT is {config.AUG.AUTO_AUGMENT}: {clipped}")
    if mixes(config) and config.AUG.MIXUP_PROB == 0:
        notices.append("AUG.MIXUP_PROB is 0: mixup and cutmix are set, but no batch is ever mixed")
    ours = flatten(config)
    notices.extend(
        f"{name} is {ours[name]}, which has no effect: {key.idle_when.reason}"
        for name, key in KEYS.items()
        if key.idle(config) and ours[name] != key.default and name not in VARIANT_KEYS
    )
    return notices


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
