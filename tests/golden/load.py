"""The stored outputs of the published implementation, and networks filled with the values that gave them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import StripMLPNet, from_published
from tests.golden.fill import fill_value, input_batch, soft_targets

FOLDER = Path(__file__).parent


@cache
def variants() -> dict[str, dict[str, Any]]:
    """Variant -> embed_dim, layers, img_size, num_classes, parameters (count), state_dict (published name -> shape)."""
    return json.loads((FOLDER / "state_dicts.json").read_text())


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of ``<name>.npz``."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def filled(variant: str, salt: int = 0) -> dict[str, Tensor]:
    """The state dict under published names with the values behind the stored outputs."""
    shapes = variants()[variant]["state_dict"]
    return {name: torch.from_numpy(np.asarray(fill_value(name, shape, salt))) for name, shape in shapes.items()}


def arguments(variant: str) -> dict[str, Any]:
    """Constructor arguments of the variant; DropPath off, as in all stored runs."""
    spec = variants()[variant]
    names = {"img_size": "img_size", "num_classes": "num_classes", "embed_dim": "embed_dim", "depths": "layers"}
    return {ours: spec[theirs] for ours, theirs in names.items()} | {"drop_path_rate": 0.0}


def golden_model(variant: str, **changes: Any) -> StripMLPNet:
    """The network of the variant with the stored values, in training mode."""
    model = StripMLPNet(**(arguments(variant) | changes))
    model.load_state_dict(from_published(filled(variant)))
    return model


def images(variant: str, batch: int, salt: int = 0) -> Tensor:
    """Normal noise of the variant's input size."""
    return torch.from_numpy(input_batch(batch, variants()[variant]["img_size"], salt))


def soft_cross_entropy(logits: Tensor, step: int = 0) -> Tensor:
    """Mean cross-entropy against the stored runs' label-smoothed targets."""
    targets = torch.from_numpy(soft_targets(len(logits), logits.shape[1], step)).to(logits.dtype)
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def training_step(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """One forward and backward pass; returns the loss and the logits."""
    logits = model(inputs)
    loss = soft_cross_entropy(logits)
    loss.backward()
    return loss.detach(), logits.detach()
