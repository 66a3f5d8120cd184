"""How a configuration differs from the published recipe or from another run, and which keys have no effect in it."""

from collections.abc import Iterator
from typing import Any

from yacs.config import CfgNode

from utils.config.facts import channel_values, mixes
from utils.config.keys import KEYS, default_config, flatten, value_of
from utils.config.policy import clipped_magnitude
from utils.config.values import read_duration

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
MANY_EPOCHS, FEW_UPDATES = 100, 10_000  # of a recipe for a large set on a small one
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
    if config.MODEL.NUM_CLASSES in (0, PUBLISHED_CLASSES.get(data_set, config.MODEL.NUM_CLASSES)):
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


def short_of_updates(config: CfgNode, num_samples: int, updates_per_epoch: int) -> str:
    """Return a sentence if the recipe is made for far more images than there are, or an empty text.

    The rule: at least ``MANY_EPOCHS`` passes, and yet fewer than ``FEW_UPDATES`` updates in all. It says nothing of
    runs whose length is given as updates or as time.
    """
    train, updates = config.TRAIN, config.TRAIN.EPOCHS * updates_per_epoch
    if train.EPOCHS < MANY_EPOCHS or updates >= FEW_UPDATES or train.UPDATES or read_duration(train.TIME_BUDGET):
        return ""
    return (
        f"this recipe is made for far more than {num_samples:,} images: its {train.EPOCHS} epochs show each of them "
        f"{train.EPOCHS} times and are {updates:,} updates in all, {train.WARMUP_EPOCHS * updates_per_epoch:,} of them "
        "warm-up, while training from scratch takes tens of thousands; fine-tune pretrained weights instead, with a "
        "recipe of configs/_base_/recipes/ (docs/OWN_DATA.md)"
    )


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
    notices.extend(_averaged_notices(config))
    ours = flatten(config)
    notices.extend(
        f"{name} is {ours[name]}, which has no effect: {key.idle_when.reason}"
        for name, key in KEYS.items()
        if key.idle(config) and ours[name] != key.default and name not in VARIANT_KEYS
    )
    return notices


def _averaged_notices(config: CfgNode) -> Iterator[str]:
    for name, values in channel_values(config).items():
        given = tuple(value_of(config, name))
        if given != values:
            yield (
                f"{name} is {given}, ImageNet's for RGB images; those of {config.MODEL.STRIP_MLP.IN_CHANS} channel(s) "
                f"take its average {values[0]:.4g} (set {name} to one value, or one for each channel)"
            )


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
