"""Baselines of any size: MLP-Mixer and ResMLP by names under which timm takes every size.

timm's own entry points, such as ``mixer_s16_224``, fix depth, width and patch size. Importing this module registers
``mlp_mixer`` and ``resmlp``, whose arguments are those of ``timm.models.mlp_mixer.MlpMixer`` (``MODEL.TIMM_KWARGS``).
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

_CFG = {
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "first_conv": "stem.proj",
    "classifier": "head",
    "num_classes": 1000,
}
default_cfgs = generate_default_cfgs({"mlp_mixer.untrained": _CFG, "resmlp.untrained": _CFG})


@register_model
def mlp_mixer(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """MLP-Mixer (arXiv 2105.01601) of any size."""
    return build_model_with_cfg(MlpMixer, "mlp_mixer", pretrained, **kwargs)


@register_model
def resmlp(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """ResMLP (arXiv 2105.03404) of any size."""
    block: dict[str, Any] = {"mlp_ratio": 4, "block_layer": ResBlock, "norm_layer": Affine}
    return build_model_with_cfg(MlpMixer, "resmlp", pretrained, **block | kwargs)
