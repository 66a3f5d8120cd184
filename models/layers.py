"""Parts of the network that know nothing of Strip-MLP.

Every map is (B, C, H, W) in PyTorch's channels_last memory order, so that a 1x1 convolution is one matrix product and a
norm over the channels reads contiguous memory; ``permute(0, 2, 3, 1)`` is then a view.

Legend: B batch, C or K channels, H rows, W columns.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Size of a map, per CPU thread, of which a few stay in the cache while operation after operation goes over them.
CACHED_BYTES = 1536 * 1024

# Types of device that have autocast at all; found out here, because not every torch.compile traces the question.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(name)
)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type in which autocast computes products on the device, None where it is off."""
    on = device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


def autocast_off(device_type: str) -> AbstractContextManager[None]:
    """Context without autocast."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)


def gelu(x: Tensor) -> Tensor:
    """``F.gelu(x)`` of a channels_last map, as the contiguous tensor it is too: on the CPU in 0.7 of the time."""
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C, H, W) -> (B, H, W, C) and back


def gelu_(x: Tensor) -> Tensor:
    """`gelu` in place."""
    torch.ops.aten.gelu_(x.permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, C)
    return x


class PointwiseLinear(nn.Linear):
    """A linear layer over the channels of a map, i.e. a 1x1 convolution with the (out, in) weight of ``nn.Linear``.

    Shape: (B, in_features, H, W) -> (B, out_features, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position. Shape: (B, C, H, W) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        with autocast_off(x.device.type):  # which would copy x to float32; the kernel accumulates in float32 anyway
            x = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


def cache_groups(x: Tensor) -> tuple[Tensor, ...]:
    """Samples in groups: on the CPU so many that a few maps of a group fit its cache, else all at once."""
    if x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling():
        return (x,)
    return x.split(max(1, CACHED_BYTES * torch.get_num_threads() // (x[0].numel() * x.element_size())))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The samples of all `parts`, one part after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def norm_over_space(y: Tensor) -> Tensor:
    """The L2 norm of each channel, (B, K, H, W) -> (B, K, 1, 1), in float32 at least, as half precision overflows."""
    halved = y.dtype in (torch.float16, torch.bfloat16)
    if y.device.type == "cpu" and not (halved or (y.requires_grad and torch.is_grad_enabled())):
        # 2 to 7 times as fast there as the operation for it, but its gradient at 0 is no number
        return joined([(part * part).sum(dim=(2, 3), keepdim=True) for part in cache_groups(y)]).sqrt()
    return torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True, dtype=torch.float32 if halved else None)


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

    def scale(self, y: Tensor) -> Tensor:
        """The factor ``1 + gamma * n`` by which the whole layer multiplies its input, (B, K, H, W) -> (B, K, 1, 1)."""
        norm = norm_over_space(y)
        response = norm / (norm.mean(dim=1, keepdim=True) + self.eps)
        return (1.0 + self.gamma.view(1, -1, 1, 1) * response).to(y.dtype)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.scale(y) + self.beta.view(1, -1, 1, 1)


def add_residual(
    x: Tensor, branch: Callable[[Tensor], Tensor], drop_path: DropPath, *, samples_apart: bool = False
) -> Tensor:
    """``x + drop_path(branch(x))``: each sample of the branch is dropped, or scaled by 1 / (1 - rate).

    With `samples_apart`, a promise that the branch mixes no samples, dropped ones are left out of it on the CPU
    (elsewhere a shape that depends on the draw would make the host wait).
    """
    if not drop_path.training or drop_path.drop_prob == 0.0:
        return x + branch(x)
    mask = drop_path(x.new_ones(len(x), 1, 1, 1))
    if samples_apart and x.device.type == "cpu" and not torch.compiler.is_compiling():
        kept = mask.flatten().nonzero().squeeze(1)
        if 0 < len(kept) < len(x):
            last = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C), so that samples are contiguous
            out = branch(last.index_select(0, kept).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            scale = 1.0 / (1.0 - drop_path.drop_prob) if drop_path.scale_by_keep else 1.0
            return last.index_add(0, kept, out.to(x.dtype), alpha=scale).permute(0, 3, 1, 2)
    return torch.addcmul(x, branch(x), mask)


@contextmanager
def _running_statistics_held(module: nn.Module) -> Iterator[None]:
    """Let the BatchNorms in `module` normalise as in training without moving their running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    held = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, num_batches_tracked in held:
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``, keeping only `x` for the backward pass, which runs the block once more.

    The second run sees the same random numbers and does not count again in the BatchNorm statistics.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running_statistics_held(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def downsample(dim: int, *, groups: int = 1) -> nn.Conv2d:
    """The 2x2 convolution with stride 2 between two stages, (B, C, H, W) -> (B, 2 * C, H / 2, W / 2), `dim` being C."""
    return nn.Conv2d(dim, 2 * dim, 2, stride=2, groups=groups, bias=False)


def drop_path_rates(rate: float, depth: int, schedule: str) -> list[float]:
    """The DropPath rate of each block: `rate` in all `depth` (``"constant"``) or from 0 up to it (``"linear"``).

    Raises:
        ValueError: if `rate` is not in [0, 1) or `schedule` is unknown.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"drop_path_rate is {rate}; it must lie in [0, 1)")
    if schedule == "constant":
        return [rate] * depth
    if schedule == "linear":
        return [rate * block / max(depth - 1, 1) for block in range(depth)]
    raise ValueError(f"drop_path_schedule is {schedule!r}; known: 'constant', 'linear'")


def square_side(img_size: int | tuple[int, int], multiple: int) -> int:
    """The side of a square image given as an int or a pair.

    Raises:
        ValueError: if the pair is not square, or the side no positive multiple of `multiple`.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height != width:
        raise ValueError(f"img_size is {height} x {width}; Strip-MLP mixes rows and columns alike: give a square")
    if height <= 0 or height % multiple != 0:
        near = max(multiple, round(height / multiple) * multiple)
        raise ValueError(f"img_size is {height}, which is no multiple of {multiple} (8 * patch_size); use {near}")
    return height
