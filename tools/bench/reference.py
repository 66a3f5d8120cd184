"""Strip-MLP in the published formulation, written plainly: the yardstick for exactness, speed and memory.

Contiguous (N, C, H, W) maps, every concatenation spelled out, the position index rebuilt in each forward pass, GRN in
four passes. Parameters carry the names of the published checkpoints. Slow on purpose; for tests and benchmarks only.
"""

from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

# Arguments of the published variants.
VARIANTS = {
    "tiny_light": {"embed_dim": 80, "depths": (2, 2, 6, 2)},
    "tiny": {"embed_dim": 80, "depths": (2, 2, 12, 2)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2)},
    "base": {"embed_dim": 112, "depths": (2, 2, 18, 2)},
}


class PositionTable(nn.Module):
    """Relative position embedding of a square map. Shape of the result: (dim, H, W)."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.embeddings_table = nn.Parameter(torch.empty(2 * size + 1, dim))
        nn.init.trunc_normal_(self.embeddings_table, std=0.02)

    def forward(self, height: int, width: int) -> Tensor:
        columns, rows = torch.arange(width), torch.arange(height)
        index = columns[None, :] - rows[:, None] + height  # (H, W)
        return self.embeddings_table[index.to(self.embeddings_table.device)].permute(2, 0, 1)  # (H, W, D) -> (D, H, W)


class StripMix(nn.Module):
    """CGSMM and LSMM, with the projection before and the fusion after them. Shape: (N, C, H, W) -> same."""

    def __init__(self, dim: int, size: int, num_patches: int) -> None:
        super().__init__()
        half = dim // 2
        self.num_patches, self.groups = num_patches, half // num_patches
        tokens = self.groups * size
        self.BN = nn.BatchNorm2d(half)
        self.proj_h = nn.Conv2d(tokens, tokens, (1, 3), padding=(0, 1), groups=self.groups)
        self.proj_w = nn.Conv2d(tokens, tokens, (1, 3), padding=(0, 1), groups=self.groups)
        self.fuse_h = nn.Conv2d(dim, half, 1, bias=False)
        self.fuse_w = nn.Conv2d(dim, half, 1, bias=False)
        self.mlp = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.GELU())
        self.fc_h = nn.Conv2d(half, half, (3, 7), padding=(1, 3), groups=half, bias=False)
        self.fc_w = nn.Conv2d(half, half, (7, 3), padding=(3, 1), groups=half, bias=False)
        self.reweight = nn.Module()
        self.reweight.fc1 = nn.Conv2d(half, half // 2, 1)
        self.reweight.fc2 = nn.Conv2d(half // 2, 3 * half, 1)
        self.fuse = nn.Conv2d(dim, dim, 1, bias=False)
        self.relate_pos_h = PositionTable(half, size)
        self.relate_pos_w = PositionTable(half, size)

    def rows(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        n, d, h, w = x.shape
        x = x.reshape(n, self.num_patches, self.groups, h, w).permute(0, 2, 4, 1, 3)  # -> (N, G, W, P, H)
        x = conv(x.reshape(n, self.groups * w, self.num_patches, h))
        x = x.reshape(n, self.groups, w, self.num_patches, h).permute(0, 3, 1, 4, 2)  # -> (N, P, G, H, W)
        return x.reshape(n, d, h, w)

    def cgsmm(self, u: Tensor) -> Tensor:
        h, w = u.shape[-2:]
        r = self.rows(u + self.relate_pos_h(h, w), self.proj_h)
        q = F.gelu(self.BN(self.fuse_h(torch.cat([r, u], dim=1)))) + self.relate_pos_w(h, w)
        c = self.rows(q.transpose(2, 3), self.proj_w).transpose(2, 3)
        return self.fuse_w(torch.cat([u, c], dim=1))

    def lsmm(self, v: Tensor) -> Tensor:
        s, t = self.fc_w(v), self.fc_h(v)
        pooled = (s + t + v).mean(dim=(2, 3), keepdim=True)
        z = self.reweight.fc2(F.gelu(self.reweight.fc1(pooled)))
        weights = z.reshape(len(v), v.shape[1], 3).permute(2, 0, 1).softmax(dim=0)[..., None, None]  # (3, N, D, 1, 1)
        return s * weights[0] + t * weights[1] + v * weights[2]

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.mlp(x).chunk(2, dim=1)
        return self.fuse(torch.cat([self.cgsmm(u), self.lsmm(v)], dim=1))


class TokenMixing(nn.Module):
    """Depthwise 3x3 convolution and strip mixing. Shape: (N, C, H, W) -> same."""

    def __init__(self, dim: int, size: int, num_patches: int) -> None:
        super().__init__()
        self.smlp_block = StripMix(dim, size, num_patches)
        self.dwsc = nn.Module()
        self.dwsc.conv_merge = nn.Module()
        self.dwsc.conv_merge.BN = nn.BatchNorm2d(dim)
        self.dwsc.conv_merge.Conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        merge = self.dwsc.conv_merge
        return self.smlp_block(merge.Conv(F.gelu(merge.BN(x))))


class ReferenceGRN(nn.Module):
    """Global response normalisation with its residual. Shape: (N, H, W, K) -> same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, y: Tensor) -> Tensor:
        norm = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (y * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + y


class ChannelMixing(nn.Module):
    """Depthwise 7x7 convolution and an MLP with GRN. Shape: (N, C, H, W) -> same."""

    def __init__(self, dim: int, alpha: int) -> None:
        super().__init__()
        self.conv_77 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, bias=False)
        self.layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, alpha * dim)
        self.fc2 = nn.Linear(alpha * dim, dim)
        self.grn = ReferenceGRN(alpha * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_77(x).permute(0, 2, 3, 1)  # -> (N, H, W, C)
        x = self.fc2(self.grn(F.gelu(self.fc1(self.layer_norm(x)))))
        return x.permute(0, 3, 1, 2)


class ReferenceBlock(nn.Module):
    """Token mixing and channel mixing, each with a residual. Shape: (N, C, H, W) -> same."""

    def __init__(self, dim: int, size: int, num_patches: int, alpha: int, drop_path: float) -> None:
        super().__init__()
        self.token_mixing = TokenMixing(dim, size, num_patches)
        self.channel_mixing = ChannelMixing(dim, alpha)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.token_mixing(x))
        return x + self.drop_path(self.channel_mixing(x))


class ReferenceStripMLP(nn.Module):
    """The whole network. Shape: (N, 3, img_size, img_size) -> (N, num_classes)."""

    def __init__(
        self,
        *,
        img_size: int = 224,
        num_classes: int = 1000,
        embed_dim: int = 80,
        depths: Sequence[int] = (2, 2, 6, 2),
        drop_path_rate: float = 0.1,
        alpha: int = 3,
    ) -> None:
        super().__init__()
        dims = [embed_dim * 2**stage for stage in range(4)]
        self.patch_embed = nn.Conv2d(3, embed_dim, 4, stride=4, bias=False)
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            size, patches = img_size // (4 * 2**stage), 2 if dim % 80 == 0 else 4
            blocks = [ReferenceBlock(dim, size, patches, alpha, drop_path_rate) for _ in range(depth)]
            setattr(self, f"blocks{stage + 1}", nn.Sequential(*blocks))
        for stage, dim in enumerate(dims[:3]):
            setattr(self, f"merging{stage + 1}", nn.Conv2d(dim, 2 * dim, 2, stride=2, bias=False))
        self.conv_s1_28 = nn.Conv2d(dims[1], dims[2], 2, stride=2, groups=dims[1], bias=False)
        self.conv_s1_14 = nn.Conv2d(dims[2], dims[3], 2, stride=2, groups=dims[2], bias=False)
        self.conv_s2_14 = nn.Conv2d(dims[2], dims[3], 2, stride=2, groups=dims[2], bias=False)
        self.head = nn.Linear(dims[3], num_classes)
        self.norm = nn.BatchNorm2d(dims[3])

    def forward(self, x: Tensor) -> Tensor:
        merged1 = self.merging1(self.blocks1(self.patch_embed(x)))
        merged2 = self.merging2(self.blocks2(merged1))
        skip = self.conv_s1_28(merged1)
        x = self.blocks3(merged2 + skip)
        x = self.blocks4(self.merging3(x) + self.conv_s1_14(skip) + self.conv_s2_14(merged2))
        return self.head(self.norm(x).mean(dim=(2, 3)))
