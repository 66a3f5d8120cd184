"""MODEL.TIMM_KWARGS: a baseline of another size."""

import pytest
import torch

from models import build_model, check_model
from tests.builders import model_config

VIT = {"TYPE": "timm", "TIMM_NAME": "test_vit"}


def test_they_change_the_size():
    model = build_model(model_config(**VIT, TIMM_KWARGS="depth=1 embed_dim=32 num_heads=2"))
    assert len(model.blocks) == 1
    assert model.embed_dim == 32


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("depth", "'depth' is not NAME=VALUE"),
        ("pretrained=True", "pretrained is not taken"),
        ("checkpoint_path=x.pth", "checkpoint_path is not taken"),
        ("num_classes=3", "num_classes is not taken"),
        ("nonsense=1", "MODEL.TIMM_KWARGS nonsense=1.* cannot be used: .*nonsense"),
    ),
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        check_model(model_config(**VIT, TIMM_KWARGS=text), torch.device("cpu"))
