"""Small things that many tests build: configurations, a tiny network, noise, randomised modules."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from models import StripMLPNet
from utils.config import default_config

TINY = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_classes": 3}


# The YAML of a tiny run. A test formats it with the keys that it needs beside these.
TINY_MODEL = "{NAME: tiny, NUM_CLASSES: 3, STRIP_MLP: {EMBED_DIM: 8, LAYERS: [1, 1, 1, 1]}}"


def config_with(**keys: Any) -> CfgNode:
    """Return the default configuration, not frozen, with keys such as ``DATA__BATCH_SIZE=4`` set."""
    config = default_config()
    for name, value in keys.items():
        *sections, key = name.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[key] = str(value) if isinstance(value, Path) else value
    return config


def data_config(**keys: Any) -> CfgNode:
    """Return a frozen configuration of a small image folder without workers, with further keys set."""
    small = {"DATASET": "folder", "NUM_WORKERS": 0, "BATCH_SIZE": 4, "IMG_SIZE": 40}
    defaults = {f"DATA__{name}": value for name, value in small.items()} | {"MODEL__NUM_CLASSES": 3}
    config = config_with(**(defaults | keys))
    config.freeze()
    return config


def model_config(**keys: Any) -> CfgNode:
    """Return the configuration of a tiny network, with further keys of the MODEL section set."""
    tiny = {"NUM_CLASSES": 5, "DROP_PATH_RATE": 0.3, "STRIP_MLP__EMBED_DIM": 16, "STRIP_MLP__LAYERS": [1, 1, 2, 1]}
    return config_with(DATA__IMG_SIZE=32, **{f"MODEL__{name}": value for name, value in (tiny | keys).items()})


def tiny_network(**changes: Any) -> StripMLPNet:
    """Return a very small network in training mode; ``changes`` replace constructor arguments."""
    return StripMLPNet(**(TINY | changes))


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Return float64 normal noise; the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_map(*shape: int, seed: int = 1) -> Tensor:
    """Return ``noise`` of shape (B, C, H, W) in channels_last memory order."""
    return noise(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return the module in float64 with every parameter and running statistic away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return module
