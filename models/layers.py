"""Parts of the network that know nothing of Strip-MLP.

Every map is (B, C, H, W) in PyTorch's channels_last memory order, so that a 1x1 convolution is one matrix product and a
norm over the channels reads contiguous memory; ``permute(0, 2, 3, 1)`` is then a view.

Legend: B batch, C or K channels, H rows, W columns.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Types of device that have autocast at all; listed here because not every release of torch.compile can trace the query.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(name)
)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the type in which autocast computes products on the device, None where autocast is off."""
    on = device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


def autocast_off(device_type: str) -> AbstractContextManager[None]:
    """Return a context without autocast."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)


class PointwiseLinear(nn.Linear):
    """A linear layer over the channels of a map, i.e. a 1x1 convolution with the (out, in) weight of ``nn.Linear``.

    Shape: (B, in_features, H, W) -> (B, out_features, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position. Shape: (B, C, H, W) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        return _channel_layer_norm(x, self.weight, self.bias, self.eps)


@torch.fx.wrap  # a tracer could not follow what depends on the input's type and device
def _channel_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
    with autocast_off(x.device.type):  # which would copy x to float32; the kernel accumulates in float32 anyway
        x = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


def mean_over_space(x: Tensor) -> Tensor:
    """Return the mean of each channel, (B, C, H, W) -> (B, C, 1, 1)."""
    return x.mean(dim=(2, 3), keepdim=True)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with stride 1, zero padding and no bias.

    Args:
        dim: channels C.
        kernel_size: rows and columns of the kernel, odd.
    Shape: (B, C, H, W) -> same.
    """

    def __init__(self, dim: int, kernel_size: tuple[int, int]) -> None:
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        super().__init__(dim, dim, kernel_size, padding=padding, groups=dim, bias=False)


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808, sec. 3) with its residual, as Strip-MLP uses it.

    With g the L2 norm of a channel over space and n = g / (mean of g over the channels + eps):
    ``out = gamma * (y * n) + beta + y``. The norm is taken in float32 at least, because its square overflows float16.

    Args:
        dim: number of channels K.
        eps: added to the mean norm.
    Shape: (B, K, H, W) -> same. The parameters keep the published shape (1, 1, 1, K).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, y: Tensor) -> Tensor:
        gamma, beta = self.gamma.view(1, -1, 1, 1), self.beta.view(1, -1, 1, 1)  # (1, 1, 1, K) -> (1, K, 1, 1)
        norm = _norm_over_space(y)
        response = norm / (norm.mean(dim=1, keepdim=True) + self.eps)
        return torch.addcmul(beta.to(y.dtype), y, (1.0 + gamma * response).to(y.dtype))  # one pass over y


@torch.fx.wrap
def _norm_over_space(y: Tensor) -> Tensor:
    """Return the L2 norm of each channel in float32 at least, (B, K, H, W) -> (B, K, 1, 1)."""
    return torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True, dtype=torch.promote_types(y.dtype, torch.float32))


def add_residual(x: Tensor, branch: Tensor, drop_path: DropPath) -> Tensor:
    """Return ``x + drop_path(branch)`` in one pass: a sample of the branch is dropped, or scaled by 1 / (1 - rate)."""
    if not drop_path.training or drop_path.drop_prob == 0.0:
        return x + branch
    return torch.addcmul(x, branch, drop_path(x.new_ones(x.shape[0], 1, 1, 1)))


@contextmanager
def _running_statistics_frozen(module: nn.Module) -> Iterator[None]:
    """Let the BatchNorms in ``module`` normalise as in training without moving their running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, num_batches_tracked in kept:
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Return ``block(x)``, keeping only ``x`` for the backward pass, which runs the block a second time.

    The second run sees the same random numbers and does not move the BatchNorm statistics again.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running_statistics_frozen(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def downsample(dim: int, *, groups: int = 1) -> nn.Conv2d:
    """Return the 2x2 convolution with stride 2 between two stages, (B, C, H, W) -> (B, 2 * C, H / 2, W / 2).

    Args:
        dim: channels C.
        groups: groups of channels that do not mix.
    """
    return nn.Conv2d(dim, 2 * dim, 2, stride=2, groups=groups, bias=False)


class NoSkip(nn.Module):
    """Stands in for a skip that is left out: returns a zero, which adds nothing. Shape: any -> ()."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def drop_path_rates(rate: float, depth: int, schedule: str) -> list[float]:
    """Return the DropPath rate of each of ``depth`` blocks.

    Args:
        rate: probability that a sample skips a branch.
        depth: number of blocks.
        schedule: ``"constant"``, ``rate`` in every block, or ``"linear"``, from 0 up to ``rate``.
    Raises:
        ValueError: if ``rate`` is not in [0, 1) or ``schedule`` is unknown.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"drop_path_rate is {rate}; it must be in [0, 1)")
    if schedule == "constant":
        return [rate] * depth
    if schedule == "linear":
        return [rate * block / max(depth - 1, 1) for block in range(depth)]
    raise ValueError(f"drop_path_schedule is {schedule!r}; known: 'constant', 'linear'")
