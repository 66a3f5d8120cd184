"""Small things that many tests build: noise, randomised modules, a tiny network."""

from typing import Any

import torch
from torch import Tensor, nn

from models import StripMLPNet

TINY = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_classes": 3}


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
