"""Keys of the model's input: image size, channels, normalisation."""

import pytest

from utils.config import config_notices, dump_config, input_shape, normalisation, parse_config, short_side
from utils.config.facts import IMAGENET_MEAN, IMAGENET_STD

PLAIN = {"AUG.AUTO_AUGMENT": "none", "AUG.COLOR_JITTER": 0}


def configured(**settings):
    return parse_config("", "a test", {name.replace("__", "."): value for name, value in settings.items()} | PLAIN)


@pytest.mark.parametrize(
    ("given", "size"), ((224, 224), ("224", 224), ("256,320", (256, 320)), ("(256, 320)", (256, 320)))
)
def test_an_image_size_is_a_number_or_a_pair(given, size):
    config = configured(DATA__IMG_SIZE=given)
    assert config.DATA.IMG_SIZE == size
    assert input_shape(config) == (3, 224, 224) if size == 224 else (3, 256, 320)
    assert parse_config(dump_config(config), "itself") == config


@pytest.mark.parametrize(
    ("given", "complaint"),
    (
        ("256,320,3", "3 entries instead of 2"),
        ("256,wide", "'wide' is not a whole number"),
        ((256, 100), "DATA.IMG_SIZE is 100, not a multiple of 32 .*; take 96 or 128"),
        ((0, 256), r"DATA.IMG_SIZE is \(0, 256\); allowed: \[1, 16384\]"),
    ),
)
def test_image_sizes_that_cannot_be(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        configured(DATA__IMG_SIZE=given)


def test_what_evaluation_has_to_cover():
    assert short_side(224, crop=True) == 256
    assert short_side((224, 448), crop=True) == (256, 512)
    assert short_side((224, 448), crop=False) is None
    assert short_side((32, 16), crop=False) == (32, 16)


def test_normalisation_of_each_channel():
    assert normalisation(configured()) == (IMAGENET_MEAN, IMAGENET_STD)
    grey = configured(MODEL__STRIP_MLP__IN_CHANS=1)
    assert normalisation(grey) == ((pytest.approx(0.449),), (pytest.approx(0.226),))
    assert [notice.partition(" is ")[0] for notice in config_notices(grey)] == ["DATA.MEAN", "DATA.STD"]
    given = configured(MODEL__STRIP_MLP__IN_CHANS=4, DATA__MEAN="0.1,0.2,0.3,0.4", DATA__STD=["0.5"])
    assert normalisation(given) == ((0.1, 0.2, 0.3, 0.4), (0.5,) * 4)
    assert config_notices(given) == []
    assert normalisation(configured(DATA__MEAN="0.5")) == ((0.5,) * 3, IMAGENET_STD)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    (
        ({"DATA__MEAN": "0.1,0.2"}, "DATA.MEAN has 2 values, but MODEL.STRIP_MLP.IN_CHANS is 3"),
        ({"MODEL__STRIP_MLP__IN_CHANS": 4, "DATA__STD": "1,1,1"}, "DATA.STD has 3 values, but .* is 4"),
        ({"DATA__MEAN": ""}, "0 entries"),
        ({"DATA__STD": "0"}, r"DATA.STD is \(0.0,\); allowed"),
        ({"MODEL__STRIP_MLP__IN_CHANS": 2, "DATA__PIPELINE": "reference"}, "takes RGB and grey images"),
        ({"DATA__IMG_SIZE": "64,32", "DATA__PIPELINE": "reference"}, "makes squares; take fast"),
    ),
)
def test_what_does_not_fit_the_channels(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        configured(**settings)


@pytest.mark.parametrize("change", ({"AUG.AUTO_AUGMENT": "rand-m5"}, {"AUG.COLOR_JITTER": 0.4}))
def test_augmentation_of_colours_needs_colours(change):
    settings = {**PLAIN, **change, "MODEL.STRIP_MLP.IN_CHANS": 4}
    with pytest.raises(ValueError, match="set AUG.AUTO_AUGMENT none and AUG.COLOR_JITTER 0"):
        parse_config("", "a test", settings)
    parse_config("", "a test", settings | {"EVAL_MODE": True})
    parse_config("", "a test", settings | {"MODEL.STRIP_MLP.IN_CHANS": 1})
