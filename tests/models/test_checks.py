"""What is wrong with a model is said in one message that names the key, without building it."""

from pathlib import Path

import pytest
import torch

from data import check_transform
from models import build_model, check_model
from utils.config import load_config, parse_config
from utils.runtime import random_state

CPU = torch.device("cpu")
TINY = {"DATA.IMG_SIZE": 32, "DATA.BATCH_SIZE": 4, "MODEL.STRIP_MLP.EMBED_DIM": 8, "MODEL.STRIP_MLP.LAYERS": [1] * 4}
NO_MIXING = {"AUG.MIXUP": 0, "AUG.CUTMIX": 0}


def timm(name: str, **values) -> dict:
    return {"MODEL.TYPE": "timm", "MODEL.TIMM_NAME": name, **values}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"DATA.BATCH_SIZE": 1, **NO_MIXING}, r"DATA.BATCH_SIZE is 1, but BatchNorm"),
        (timm("dla46_c") | {"TRAIN.USE_CHECKPOINT": True}, r"--use-checkpoint\) is True, but MODEL.TIMM_NAME dla46_c"),
        (timm("inception_v3") | {"DATA.IMG_SIZE": 64}, r"inception_v3 at DATA.IMG_SIZE 64.* cannot be used"),
        (timm("vit_tiny_patch16_224") | {"DATA.IMG_SIZE": 8}, r"DATA.IMG_SIZE 8"),
        (timm("resnet5O"), r"MODEL.TIMM_NAME is 'resnet5O'.*did you mean"),
        (timm("resnet50.nonsense"), r"no such tag; known: .*a1_in1k"),
        ({"DATA.IMG_SIZE": 4096, "DATA.BATCH_SIZE": 4096}, r"DATA.IMG_SIZE 4096.*needs at least"),
        ({"MODEL.STRIP_MLP.EMBED_DIM": 65536}, r"EMBED_DIM 65536.*needs at least"),
    ],
)
def test_what_cannot_be_built_or_run(settings, complaint):
    config = parse_config("", "a test", TINY | settings)
    with pytest.raises(ValueError, match=complaint) as info:
        check_model(config, CPU)
    assert len(str(info.value).splitlines()) == 1


@pytest.mark.parametrize("channels", (1, 3, 4))
def test_other_channels_and_rectangles_are_possible(channels):
    settings = {"MODEL.STRIP_MLP.IN_CHANS": channels, "DATA.IMG_SIZE": (64, 96)}
    config = parse_config("", "a test", TINY | settings | {"AUG.AUTO_AUGMENT": "none", "AUG.COLOR_JITTER": 0})
    check_transform(config)
    check_model(config, CPU)


def test_evaluation_of_one_image_is_possible():
    check_model(parse_config("", "a test", TINY | {"DATA.BATCH_SIZE": 1, **NO_MIXING}), CPU, training=False)


@pytest.mark.parametrize("path", sorted(Path("configs").resolve().glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_pass_and_no_random_number_is_used(path):
    config = load_config(path, ["DATA.BATCH_SIZE", "2"])  # the test machine may be small
    before = random_state()
    check_transform(config)
    check_model(config, CPU)
    after = random_state()
    assert before["python"] == after["python"]
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][1], after["numpy"][1])


def test_what_building_logs_is_logged_once(caplog):
    config = parse_config("", "a test", timm("dla46_c") | {"DATA.BATCH_SIZE": 2})
    check_model(config, CPU)
    assert caplog.messages == []
    build_model(config)
    assert ["takes no drop_path_rate" in text for text in caplog.messages] == [True]
