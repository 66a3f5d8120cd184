"""The table of keys: what a row says of a key holds in files, on the command line, in checks and in comparisons."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from models import build_model
from utils.config import config_notices, default_config, load_config, parse_config, recipe_differences
from utils.config.keys import KEYS, Key, flatten
from utils.config.reference import reference

# The published defaults, written out a second time on purpose: a changed default must be a decision.
PUBLISHED = {
    "DATA.BATCH_SIZE": 64,
    "DATA.DATA_PATH": "",
    "DATA.DATASET": "imagenet",
    "DATA.IMG_SIZE": 224,
    "DATA.INTERPOLATION": "bicubic",
    "DATA.ZIP_MODE": False,
    "DATA.CACHE_MODE": "part",
    "DATA.PIN_MEMORY": True,
    "DATA.NUM_WORKERS": -1,  # published: 8
    "MODEL.TYPE": "strip_mlp_layer",
    "MODEL.NAME": "strip_mlp",
    "MODEL.PRETRAINED": "",
    "MODEL.RESUME": "",
    "MODEL.NUM_CLASSES": 1000,
    "MODEL.DROP": False,
    "MODEL.DROP_RATE": 0.2,
    "MODEL.DROP_PATH_RATE": 0.1,
    "MODEL.ALPHA": 3,
    "MODEL.PATCH_NORM": True,
    "MODEL.LABEL_SMOOTHING": 0.1,
    "MODEL.STRIP_MLP.PATCH_SIZE": 4,
    "MODEL.STRIP_MLP.IN_CHANS": 3,
    "MODEL.STRIP_MLP.EMBED_DIM": 80,
    "MODEL.STRIP_MLP.LAYERS": [2, 2, 6, 2],
    "TRAIN.EPOCHS": 300,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.WEIGHT_DECAY": 0.05,
    "TRAIN.BASE_LR": 5e-4,
    "TRAIN.WARMUP_LR": 5e-7,
    "TRAIN.MIN_LR": 5e-6,
    "TRAIN.CLIP_GRAD": 5.0,
    "TRAIN.AUTO_RESUME": True,
    "TRAIN.ACCUMULATION_STEPS": 0,
    "TRAIN.USE_CHECKPOINT": False,
    "TRAIN.LR_SCHEDULER.NAME": "cosine",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 30,
    "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.1,
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.OPTIMIZER.EPS": 1e-8,
    "TRAIN.OPTIMIZER.BETAS": (0.9, 0.999),
    "TRAIN.OPTIMIZER.MOMENTUM": 0.9,
    "AUG.COLOR_JITTER": 0.4,
    "AUG.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
    "AUG.REPROB": 0.25,
    "AUG.REMODE": "pixel",
    "AUG.RECOUNT": 1,
    "AUG.MIXUP": 0.8,
    "AUG.CUTMIX": 1.0,
    "AUG.CUTMIX_MINMAX": None,
    "AUG.MIXUP_PROB": 1.0,
    "AUG.MIXUP_SWITCH_PROB": 0.5,
    "AUG.MIXUP_MODE": "batch",
    "TEST.CROP": True,
    "AMP_OPT_LEVEL": "",
    "OUTPUT": "",
    "TAG": "default",
    "SAVE_FREQ": 20,
    "PRINT_FREQ": 100,
    "SEED": 0,
    "EVAL_MODE": False,
    "THROUGHPUT_MODE": False,
}


# What may differ when a run is resumed, written out a second time for the same reason.
MAY_DIFFER_ON_RESUME = """
    DATA.DATA_PATH DATA.ZIP_MODE DATA.CACHE_MODE DATA.PIN_MEMORY DATA.NUM_WORKERS DATA.DOWNLOAD DATA.VAL_CACHE
    DATA.CACHE_DECODED DATA.LOADER_TIMEOUT MODEL.NAME MODEL.PATCH_NORM MODEL.PRETRAINED MODEL.RESUME
    MODEL.WEIGHTS_KEY MODEL.STRIP_PREFIX TRAIN.AUTO_RESUME TRAIN.DISTILL.TEACHER
    TRAIN.USE_CHECKPOINT TRAIN.SAVE_STEPS TRAIN.SAVE_MINUTES TRAIN.SAVE_KEEP TRAIN.MAX_RUN_MINUTES TRAIN.MAX_NONFINITE
    TRAIN.DIST_TIMEOUT TEST.CROP TEST.CROP_RATIO TEST.FLIP TEST.CLASS_NAMES TEST.REAL_LABELS TEST.CORRUPTIONS
    TEST.BATCH_SIZE TEST.INTERVAL AMP_OPT_LEVEL OUTPUT TAG SAVE_FREQ PRINT_FREQ EVAL_MODE
    THROUGHPUT_MODE LOGGER
"""

PLAIN = {"AUG.AUTO_AUGMENT": "none", "AUG.COLOR_JITTER": 0.0}  # which images of any number of channels need
ONE_VALUE = {"DATA.MEAN": (0.5,), "DATA.STD": (0.25,)}

# (settings, keys without effect under them)
IDLE = [
    ({}, "MODEL.PATCH_NORM MODEL.DROP_RATE MODEL.TIMM_NAME DATA.CACHE_MODE AUG.COLOR_JITTER TRAIN.EMA_WARMUP"),
    ({}, "MODEL.TIMM_KWARGS DATA.TIMM_OPTIONS"),
    ({}, "TRAIN.LR_SCHEDULER.DECAY_EPOCHS TRAIN.LR_SCHEDULER.DECAY_RATE TRAIN.OPTIMIZER.MOMENTUM"),
    ({}, "TRAIN.OPTIMIZER.OPTIONS TRAIN.LOSS.BCE_THRESHOLD TRAIN.LOSS.BCE_SUM"),
    ({}, "TRAIN.DISTILL.TEACHER TRAIN.DISTILL.TIMM_NAME TRAIN.DISTILL.WEIGHT TRAIN.DISTILL.TEMPERATURE"),
    ({}, "TRAIN.COMPILE_MODE TRAIN.MEMORY_BUDGET"),
    ({"MODEL.TYPE": "timm", "MODEL.TIMM_NAME": "x"}, "MODEL.ALPHA MODEL.DROP_PATH_SCHEDULE TRAIN.LEAN"),
    ({"MODEL.TYPE": "timm", "MODEL.TIMM_NAME": "x"}, "MODEL.STRIP_MLP.PATCH_SIZE MODEL.STRIP_MLP.NUM_PATCHES"),
    ({"MODEL.TYPE": "timm", "MODEL.TIMM_NAME": "x"}, "MODEL.STRIP_MLP.TOKEN_MIXING MODEL.STRIP_MLP.STAGE_SKIPS"),
    ({"MODEL.STRIP_MLP.TOKEN_MIXING": "lsmm"}, "MODEL.STRIP_MLP.STRIP_WIDTH MODEL.STRIP_MLP.NUM_PATCHES"),
    ({"AUG.REPROB": 0}, "AUG.REMODE AUG.RECOUNT"),
    ({"AUG.MIXUP": 0, "AUG.CUTMIX": 0}, "AUG.MIXUP_PROB AUG.MIXUP_SWITCH_PROB AUG.MIXUP_MODE AUG.MIXUP_OFF_EPOCHS"),
    ({"TRAIN.WARMUP_EPOCHS": 0}, "TRAIN.WARMUP_LR"),
    ({"TRAIN.LR_SCHEDULER.NAME": "linear"}, "TRAIN.MIN_LR TRAIN.LR_SCHEDULER.WARMUP_PREFIX"),
    ({"TRAIN.LR_SCHEDULER.NAME": "step"}, "TRAIN.MIN_LR"),
    ({"TRAIN.OPTIMIZER.NAME": "sgd"}, "TRAIN.OPTIMIZER.EPS TRAIN.OPTIMIZER.BETAS TRAIN.OPTIMIZER.OPTIONS"),
    ({"TRAIN.OPTIMIZER.NAME": "lamb"}, "TRAIN.OPTIMIZER.EPS TRAIN.OPTIMIZER.BETAS TRAIN.OPTIMIZER.MOMENTUM"),
    ({"TRAIN.DISTILL.KIND": "hard", "TRAIN.DISTILL.TIMM_NAME": "x"}, "TRAIN.DISTILL.TEMPERATURE"),
    ({"TRAIN.GLOBAL_BATCH": 512}, "DATA.BATCH_SIZE TRAIN.ACCUMULATION_STEPS"),
    ({"TRAIN.TIME_BUDGET": "1h"}, "TRAIN.UPDATES"),
]
# (settings, keys with an effect under them that they do not have, or might seem not to have, under others)
ACTIVE = [
    ({"MODEL.DROP": True}, "MODEL.DROP_RATE"),
    ({"MODEL.TYPE": "timm", "MODEL.TIMM_NAME": "x"}, "MODEL.TIMM_NAME MODEL.TIMM_KWARGS"),
    ({"DATA.DATASET": "timm:x"}, "DATA.TIMM_OPTIONS"),
    ({"MODEL.TYPE": "timm", "MODEL.TIMM_NAME": "x", **PLAIN, **ONE_VALUE}, "MODEL.STRIP_MLP.IN_CHANS"),
    ({"AUG.AUTO_AUGMENT": "none"}, "AUG.COLOR_JITTER"),
    ({"AUG.AUTO_AUGMENT": ""}, "AUG.COLOR_JITTER"),
    ({"TRAIN.LR_SCHEDULER.NAME": "step"}, "TRAIN.LR_SCHEDULER.DECAY_EPOCHS TRAIN.LR_SCHEDULER.DECAY_RATE"),
    ({"TRAIN.LR_SCHEDULER.NAME": "step"}, "TRAIN.LR_SCHEDULER.WARMUP_PREFIX"),
    ({"TRAIN.OPTIMIZER.NAME": "sgd"}, "TRAIN.OPTIMIZER.MOMENTUM"),
    ({"TRAIN.OPTIMIZER.NAME": "lamb"}, "TRAIN.OPTIMIZER.OPTIONS"),
    ({"TRAIN.LOSS.NAME": "bce"}, "TRAIN.LOSS.BCE_THRESHOLD TRAIN.LOSS.BCE_SUM"),
    (
        {"TRAIN.DISTILL.KIND": "soft", "TRAIN.DISTILL.TIMM_NAME": "x"},
        "TRAIN.DISTILL.TIMM_NAME TRAIN.DISTILL.WEIGHT TRAIN.DISTILL.TEMPERATURE",
    ),
    ({"TRAIN.GLOBAL_BATCH": 512, "THROUGHPUT_MODE": True}, "DATA.BATCH_SIZE"),
    ({"TRAIN.EMA_DECAY": 0.9}, "TRAIN.EMA_WARMUP"),
    ({"TRAIN.COMPILE": True}, "TRAIN.COMPILE_MODE TRAIN.MEMORY_BUDGET"),
    ({"AUG.MIXUP": 0, "AUG.CUTMIX": 0, "AUG.CUTMIX_MINMAX": (0.1, 0.3)}, "AUG.MIXUP_PROB AUG.MIXUP_MODE"),
]
# What another value of a key sets or needs besides.
BESIDES = {
    "AMP_OPT_LEVEL": {"TRAIN.AMP": "fp16"},
    "MODEL.TYPE": {"MODEL.TIMM_NAME": "resnet50"},
    "TRAIN.DISTILL.KIND": {"TRAIN.DISTILL.TIMM_NAME": "resnet50"},
    "MODEL.STRIP_MLP.PATCH_SIZE": {"DATA.IMG_SIZE": 256},
    "MODEL.STRIP_MLP.IN_CHANS": PLAIN,
}

every_key = pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)


def configured(settings: dict[str, Any]) -> CfgNode:
    return parse_config("", "a test", settings)


def another(key: Key) -> Any:
    """Return a value of the key that is allowed and is not the default."""

    def changed(number: float) -> float:
        return (2 * number if number > 0 else 1) if isinstance(number, int) else number / 2 or 0.5

    if key.name == "MODEL.STRIP_MLP.STRIP_WIDTH":
        return 5
    if key.choices:
        return next(choice for choice in reversed(key.choices) if choice != key.default)
    if isinstance(key.default, str):
        known = {"AUG.AUTO_AUGMENT": "augmix", "TRAIN.OPTIMIZER.OPTIONS": "eps=1e-3", "TRAIN.TIME_BUDGET": "90m"}
        return known.get(key.name, "other")
    if key.default is None:
        return (0.2, 0.4)
    if isinstance(key.default, bool):
        return not key.default
    if isinstance(key.default, (int, float)):
        return changed(key.default)
    return type(key.default)(map(changed, key.default))


def out_of_range(key: Key, value: Any) -> bool:
    """Return whether the configuration is refused because the key's value is not in its interval."""
    try:
        configured({key.name: value})
    except ValueError as error:
        return f"{key.name} is {value}; allowed: {key.allowed}" in str(error)
    return False


def test_defaults_are_the_published_values():
    defaults = flatten(default_config())
    assert {name: defaults[name] for name in PUBLISHED} == PUBLISHED
    assert set(defaults) - set(PUBLISHED) == {name for name, key in KEYS.items() if key.ours}


def test_each_default_configuration_is_its_own():
    default_config().MODEL.STRIP_MLP.LAYERS.append(2)
    assert flatten(default_config())["MODEL.STRIP_MLP.LAYERS"] == PUBLISHED["MODEL.STRIP_MLP.LAYERS"]


@every_key
def test_a_key_takes_another_value(key, tmp_path):
    value, besides = another(key), BESIDES.get(key.name, {})
    (tmp_path / "empty.yaml").write_text("")
    words = [str(word) for pair in {key.name: value, **besides}.items() for word in pair]
    config, defaults = flatten(load_config(tmp_path / "empty.yaml", words)), flatten(default_config())
    assert {name: config[name] for name in config if config[name] != defaults[name]} == {key.name: value, **besides}
    assert type(config[key.name]) is type(value)


@every_key
def test_a_key_refuses_other_types(key):
    expected = r"is not text|is not true or false|is not a|1 entries instead of"
    with pytest.raises(ValueError, match=expected):
        configured({key.name: ["a", "b"] if isinstance(key.default, str) else "what"})
    with pytest.raises(ValueError, match=expected):
        configured({key.name: 1.5 if isinstance(key.default, bool) else True})


@pytest.mark.parametrize("key", [key for key in KEYS.values() if key.choices], ids=lambda key: key.name)
def test_a_key_takes_its_names_in_any_case_and_no_others(key):
    assert key.default in key.choices
    assert [key.read(choice.swapcase()) for choice in key.choices] == list(key.choices)
    longest = max(key.choices, key=len)
    with pytest.raises(ValueError, match=rf"{key.name}: '{longest}x' is unknown; known: .*; did you mean {longest}\?"):
        configured({key.name: f"{longest}x"})


NUMBERS = [key for key in KEYS.values() if not isinstance(key.default, (bool, str))]


@pytest.mark.parametrize("key", NUMBERS, ids=lambda key: key.name)
def test_a_number_ends_where_its_interval_ends(key):
    value = another(key)
    numbers = value if isinstance(value, (list, tuple)) else [value]
    low, high = (float(end) for end in key.allowed[1:-1].split(","))

    def refused(number: float) -> bool:
        number = type(numbers[0])(number)
        return out_of_range(key, number if value is not numbers else type(value)([number, *numbers[1:]]))

    assert refused(low - 1)
    assert refused(low) is key.allowed.startswith("(")
    assert isinstance(numbers[0], int) or refused(math.nan)
    if high < math.inf:
        assert refused(high) is key.allowed.endswith(")")
        assert refused(high + 1 if isinstance(numbers[0], int) else math.nextafter(high, math.inf))


@every_key
def test_a_changed_key_counts_where_it_can_change_the_weights(key):
    changed = configured({key.name: another(key), **BESIDES.get(key.name, {})})
    without_effect = " ".join(names for settings, names in IDLE if not settings).split()
    same = {*MAY_DIFFER_ON_RESUME.split(), *without_effect, "TRAIN.ACCUMULATION_STEPS"}  # 0 and 1 are no accumulation
    expected = ({key.name} - same) | set(BESIDES.get(key.name, ()))
    assert set(recipe_differences(default_config(), changed)) == expected


@pytest.mark.parametrize(("settings", "names"), IDLE)
def test_keys_without_effect_are_named_and_do_not_count(settings, names):
    base = configured(settings)
    config = configured({**settings, **{name: another(KEYS[name]) for name in names.split()}})
    assert {notice.split(" is ")[0] for notice in config_notices(config)} == set(names.split())
    assert recipe_differences(base, config) == {}


@pytest.mark.parametrize(("settings", "names"), ACTIVE)
def test_keys_with_an_effect_are_not_named_and_count(settings, names):
    base = configured(settings)
    config = configured({**settings, **{name: another(KEYS[name]) for name in names.split()}})
    assert config_notices(config) == []
    assert set(recipe_differences(base, config)) == set(names.split())


def test_the_size_of_strip_mlp_has_no_effect_on_a_timm_model():
    """It has no notice either: the config of a variant may be the base of a baseline's."""
    timm = {"MODEL.TYPE": "timm", "MODEL.TIMM_NAME": "x"}
    config = configured({**timm, "MODEL.STRIP_MLP.EMBED_DIM": 96, "MODEL.STRIP_MLP.LAYERS": [1, 1, 1, 1]})
    assert recipe_differences(configured(timm), config) == {}
    assert config_notices(config) == []


def test_config_and_network_accept_the_same_widths():
    """Neither package may import the other, so that what the widths have to divide into stands in both."""

    def refuses(build, *arguments) -> bool:
        try:
            build(*arguments)
        except ValueError:
            return True
        return False

    config = default_config()
    config.DATA.IMG_SIZE, config.MODEL.STRIP_MLP.LAYERS = 32, [1, 1, 1, 1]
    for width in range(2, 172, 2):
        config.MODEL.STRIP_MLP.EMBED_DIM = width
        with torch.device("meta"):
            assert refuses(build_model, config) == refuses(configured, {"MODEL.STRIP_MLP.EMBED_DIM": width}), width


def test_the_reference_page_is_up_to_date():
    page = Path(__file__).resolve().parents[2] / "docs" / "CONFIG.md"
    assert page.read_text() == reference(), "run: python -m utils.config.reference > docs/CONFIG.md"
    assert all(f"`{name}`" in reference() for name in KEYS)
