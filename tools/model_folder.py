"""A model as timm's folder: weights in safetensors, a config and a card; the weight file says what it is."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from timm.models._hub import generate_readme
from torch import nn

from inference import Opened
from models import StripMLPNet, timm_kwargs
from utils.checkpoint import FORMAT_VERSION, METADATA_KEY, WEIGHTS_FILE
from utils.config import dump_config, input_shape, recipe_deviations
from utils.runtime import atomic_file

FILES = [WEIGHTS_FILE, "config.json", "README.md"]


def description(opened: Opened, accuracy: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a file says about itself, as plain types: a checkpoint's entries, and how it was trained."""
    config = opened.config
    return {
        "format_version": FORMAT_VERSION,
        "variant": architecture(opened)[0],
        "config": dump_config(config),
        "classes": list(opened.classes),
        "preprocessing": opened.preprocessing,
        "num_samples": opened.metadata.get("num_samples"),
        "deviations": {key: list(pair) for key, pair in recipe_deviations(config).items()},
        "accuracy": accuracy,
        "versions": opened.metadata.get("versions", {}),
        "exported_with": {"torch": str(torch.__version__), "timm": timm.__version__},
    }


def architecture(opened: Opened) -> tuple[str, dict[str, Any]]:
    """Return the timm name of the model and the arguments that ``timm.create_model`` needs to build it again."""
    model, strip = opened.model, opened.config.MODEL.STRIP_MLP
    args: dict[str, Any] = {"num_classes": opened.config.MODEL.NUM_CLASSES, "in_chans": strip.IN_CHANS}
    if not isinstance(model, StripMLPNet):
        if model.pretrained_cfg.get("fixed_input_size"):
            args["img_size"] = opened.config.DATA.IMG_SIZE
        return model.pretrained_cfg["architecture"], args | timm_kwargs(opened.config.MODEL.TIMM_KWARGS)
    args |= {"img_size": opened.config.DATA.IMG_SIZE, "patch_size": strip.PATCH_SIZE, "embed_dim": strip.EMBED_DIM}
    args |= {"depths": list(strip.LAYERS), "mlp_ratio": opened.config.MODEL.ALPHA}
    args |= {"num_patches": strip.NUM_PATCHES or None, "strip_width": strip.STRIP_WIDTH}
    args |= {"token_mixing": strip.TOKEN_MIXING, "stage_skips": strip.STAGE_SKIPS}
    variants = {(80, 6): "tiny_light", (80, 12): "tiny", (96, 18): "small", (112, 18): "base"}
    return f"strip_mlp_{variants.get((strip.EMBED_DIM, strip.LAYERS[2]), 'tiny')}", args


def timm_form(opened: Opened) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model as timm builds it, with the same weights, and the arguments of timm's writers."""
    name, args = architecture(opened)
    model = timm.create_model(name, **args)
    model.load_state_dict(opened.model.state_dict())
    steps = opened.preprocessing
    shape = input_shape(opened.config)
    cfg = {
        "input_size": shape,
        "interpolation": steps["interpolation"],
        "crop_pct": opened.config.TEST.CROP_RATIO if steps["short_side"] not in (None, steps["img_size"]) else 1.0,
        "crop_mode": "center" if steps["crop"] else "squash",
        "mean": tuple(steps["mean"]),
        "std": tuple(steps["std"]),
        "num_classes": args["num_classes"],
    }
    labels = {"label_names": list(opened.classes)} if opened.classes else {}
    return model, {"model_config": {"pretrained_cfg": cfg, **labels}, "model_args": args}


def write_folder(opened: Opened, folder: Path, *, accuracy: dict[str, Any] | None, card: bool) -> None:
    """Write timm's folder, whose weight file also says everything that a checkpoint of this project says."""
    model, options = timm_form(opened)
    save_for_hf(model, folder, safe_serialization=True, **options)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    about = json.dumps(description(opened, accuracy), default=list)
    with atomic_file(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, {"format": "pt", METADATA_KEY: about}))
    if card:
        text = generate_readme(model_card(opened, accuracy), folder.name)
        (folder / "README.md").write_text(text, encoding="utf-8")


def model_card(opened: Opened, accuracy: dict[str, Any] | None) -> dict[str, Any]:
    """Return timm's description of a model card; class names stay out of it, they are in ``config.json``."""
    config = opened.config
    known = accuracy and f"{accuracy['acc1']:.2f} % top-1 on {accuracy['num_samples']} validation images"
    return {
        "license": "other",
        "description": f"{opened.model_name}, an image classifier trained by a reproduction of Strip-MLP (ICCV 2023).",
        "details": {
            "Architecture": architecture(opened)[0],
            "Image size": config.DATA.IMG_SIZE,
            "Classes": config.MODEL.NUM_CLASSES,
            "Data": config.DATA.DATASET,
            "Accuracy": known or "not known",
            "Deviations from the published recipe": [
                f"`{key}`: published {published}, here {here}"
                for key, (published, here) in recipe_deviations(config).items()
            ],
        },
        "usage": "`timm.create_model('hf-hub:OWNER/NAME', pretrained=True)`, for Strip-MLP after `import strip_mlp`.",
    }
