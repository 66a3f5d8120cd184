"""Config -> model: Strip-MLP, or any timm model as a baseline through the same recipe."""

import ast
import difflib
import logging
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from .freezing import freeze, scale_head
from .strip_mlp import StripMLPNet

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

# Arguments of timm.create_model that MODEL.TIMM_KWARGS must not hold.
_NOT_KWARGS = {
    *("num_classes", "in_chans", "img_size", "drop_rate", "drop_path_rate", "model_name", "features_only"),
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable"),
}


def build_model(config: "CfgNode", num_classes: int = 0) -> nn.Module:
    """Return the model that the MODEL keys of the config describe, on the CPU, in training mode.

    MODEL.DROP_RATE has an effect only where MODEL.DROP is true. TRAIN.USE_CHECKPOINT switches on activation
    checkpointing, MODEL.HEAD_INIT_SCALE scales the head, TRAIN.FREEZE keeps parts from training; not for evaluation.

    Args:
        config: the configuration.
        num_classes: outputs of the head; 0 takes MODEL.NUM_CLASSES.

    Raises:
        ValueError: if MODEL.TYPE or MODEL.TIMM_NAME is unknown, or the model refuses a value.
    """
    builders = {"strip_mlp_layer": _build_strip_mlp, "timm": _build_timm}
    if config.MODEL.TYPE not in builders:
        raise ValueError(f"MODEL.TYPE is {config.MODEL.TYPE!r}; known: {', '.join(map(repr, builders))}")
    num_classes = num_classes or config.MODEL.NUM_CLASSES
    if not num_classes:
        raise ValueError(
            "MODEL.NUM_CLASSES is 0, the number of classes of the data, but here neither data nor class names of a "
            "checkpoint say how many; set it, for example with --opts MODEL.NUM_CLASSES 10"
        )
    model = builders[config.MODEL.TYPE](config, num_classes)
    if config.EVAL_MODE or config.THROUGHPUT_MODE:
        return model
    if config.TRAIN.USE_CHECKPOINT:
        model.set_grad_checkpointing(True)
    if config.MODEL.HEAD_INIT_SCALE != 1.0:
        scale_head(model, config.MODEL.HEAD_INIT_SCALE)
    if config.TRAIN.FREEZE != "none":
        freeze(model, config.TRAIN.FREEZE)
    return model


def _drop_rates(config: "CfgNode") -> dict[str, float]:
    return {
        "drop_rate": config.MODEL.DROP_RATE if config.MODEL.DROP else 0.0,
        "drop_path_rate": config.MODEL.DROP_PATH_RATE,
    }


def _build_strip_mlp(config: "CfgNode", num_classes: int) -> StripMLPNet:
    strip = config.MODEL.STRIP_MLP
    return StripMLPNet(
        img_size=config.DATA.IMG_SIZE,
        patch_size=strip.PATCH_SIZE,
        in_chans=strip.IN_CHANS,
        num_classes=num_classes,
        embed_dim=strip.EMBED_DIM,
        depths=strip.LAYERS,
        mlp_ratio=config.MODEL.ALPHA,
        num_patches=strip.NUM_PATCHES or None,  # 0 in the config is the published rule
        strip_width=strip.STRIP_WIDTH,
        token_mixing=strip.TOKEN_MIXING,
        stage_skips=strip.STAGE_SKIPS,
        drop_path_schedule=config.MODEL.DROP_PATH_SCHEDULE,
        **_drop_rates(config),
    )


def _build_timm(config: "CfgNode", num_classes: int) -> nn.Module:
    """Return a timm model without pretrained weights, at the config's image size where the model has a fixed one."""
    name = config.MODEL.TIMM_NAME
    if not name or not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists the names"
        raise ValueError(f"MODEL.TIMM_NAME is {name!r}, which timm {timm.__version__} does not know; {hint}")
    tag = name.partition(".")[2]
    tags = timm.models.list_pretrained(f"{name.partition('.')[0]}.*") if tag else []
    if tag and name not in tags:
        known = ", ".join(found.partition(".")[2] for found in tags) or "none"
        raise ValueError(f"MODEL.TIMM_NAME is {name!r}, but timm {timm.__version__} knows no such tag; known: {known}")
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": config.MODEL.STRIP_MLP.IN_CHANS}
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        options["img_size"] = config.DATA.IMG_SIZE
    options |= timm_kwargs(config.MODEL.TIMM_KWARGS)
    return _create_with_accepted(name, options, _drop_rates(config))


def timm_kwargs(text: str) -> dict[str, Any]:
    """Return the arguments of MODEL.TIMM_KWARGS; values are read as literals, else as text, as timm's programs do."""
    found: dict[str, Any] = {}
    for word in text.split():
        name, sign, value = word.partition("=")
        if not (sign and name.isidentifier()):
            raise ValueError(f"MODEL.TIMM_KWARGS: {word!r} is not NAME=VALUE (without spaces in it)")
        if name in _NOT_KWARGS:
            raise ValueError(f"MODEL.TIMM_KWARGS: {name} is not taken: other keys set it, or it would read files")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _create_with_accepted(name: str, options: dict[str, Any], drop_rates: dict[str, float]) -> nn.Module:
    """Create the timm model with those of ``drop_rates`` that its constructor accepts; a refused rate is logged."""
    wanted = dict(drop_rates)
    while True:
        try:
            return timm.create_model(name, pretrained=False, **options, **wanted)
        except TypeError as error:
            refused = [key for key in wanted if f"unexpected keyword argument '{key}'" in str(error)]
            if not refused:
                raise
            rate = wanted.pop(refused[0])
            if rate:
                logger.warning("timm model %s takes no %s; %s has no effect", name, refused[0], rate)
