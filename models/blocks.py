"""The parts of Strip-MLP (Cao et al., ICCV 2023, arXiv 2307.11458): layers, mixing blocks and the block they form.

A stage is a row of blocks; a block is a strip mixing block (tokens) and a channel mixing block (channels), each with a
residual. The strip mixing block sends half of the channels through the CGSMM (long range, cascaded rows then columns)
and half through the LSMM (short range).

Legend, for the shapes after every reshape and permute:
    B batch, C channels, K = mlp_ratio * C hidden channels, H rows, W columns,
    D = C / 2 channels of one branch, P patches, G = D / P channels per patch.
All maps are (B, C, H, W) in channels_last memory order.

What belongs to a size: row mixing to W, column mixing to H, the position tables to both; ``models.resample`` turns such
weights into those of another size. A ``size`` is (H, W), or one number for a square.
"""

import torch
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import GRN, ChannelLayerNorm, DepthwiseConv2d, PointwiseLinear, add_residual, autocast_off, mean_over_space


class RelativePosition(nn.Module):
    """Adds a learned relative position map, ``pos[d, h, w] = table[w - h + H, d]``.

    The first and the last row of the table are never read.

    Args:
        dim: channels D.
        size: (H, W) of the map.
    Shape: (B, D, H, W) -> same.
    """

    def __init__(self, dim: int, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = to_2tuple(size)
        self.table = nn.Parameter(torch.empty(sum(self.size) + 1, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def position_map(self) -> Tensor:
        """Return the map that is added, (D, H, W)."""
        height, width = self.size
        windows = self.table.unfold(0, width, 1)  # (H+W+1, D) -> (H+2, D, W), window i holds the rows i .. i+W-1
        windows = windows[1 : height + 1].permute(0, 2, 1)  # (H+2, D, W) -> (H, W, D)
        return windows.flip(0).permute(2, 0, 1)  # row h of the map is window H - h -> (D, H, W), channels_last

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position_map().to(x.dtype)


class StripMLPLayer(nn.Module):
    """Strip MLP layer (sec. 3.2): the tokens of a row take from their own row and from the rows above and below.

    The channels are cut into P patches of G (channel d = p * G + g); a patch shares its weights with the other patches,
    while each of its G channels has its own. As a formula, with zeros outside the map:
    ``r[p, g, h, w'] = bias[g, w'] + sum over e in {-1, 0, 1} and w of weight[g, w', w, e + 1] * x[p, g, h + e, w]``,
    which is a grouped convolution over (patch, row) whose channels are the pairs (g, w). These e are those of a
    strip width of 3, as published; with 5 they are -2 to 2, with 1 a row is mixed alone.

    Args:
        dim: channels D.
        size: tokens that are mixed, W for rows and H for columns.
        num_patches: patches P, a divisor of D.
        axis: ``"row"`` mixes along the rows as above, ``"column"`` along the columns (H and W change places).
        strip_width: rows that a token sees, its own in the middle, so odd.
    Shape: (B, D, H, W) -> (B, H, W, P, G), a view in the convolution's memory order, to be copied by ``cat_channels``.
    Raises:
        ValueError: if ``num_patches`` does not divide ``dim``, ``axis`` is unknown, or ``strip_width`` is even.
    """

    def __init__(self, dim: int, size: int, num_patches: int, axis: str, *, strip_width: int = 3) -> None:
        super().__init__()
        if num_patches < 1 or dim % num_patches != 0:
            raise ValueError(f"{dim} channels cannot be cut into {num_patches} patches; choose a divisor of {dim}")
        if axis not in ("row", "column"):
            raise ValueError(f"axis is {axis!r}; known: 'row', 'column'")
        if strip_width < 1 or strip_width % 2 == 0:
            raise ValueError(f"strip_width is {strip_width}; it must be odd and positive, such as 1, 3 or 5")
        self.num_patches = num_patches
        self.axis = axis
        tokens = dim // num_patches * size
        padding = (0, strip_width // 2)
        self.mix = nn.Conv2d(tokens, tokens, (1, strip_width), padding=padding, groups=dim // num_patches)

    def forward(self, x: Tensor) -> Tensor:
        x = split_patches(x, self.num_patches)  # (B, D, H, W) -> (B, H, W, P, G)
        if self.axis == "column":
            x = x.transpose(1, 2)  # H and W change places, here and in the shapes below
        x = x.permute(0, 3, 1, 4, 2).flatten(3)  # (B, H, W, P, G) -> (B, P, H, G, W) -> (B, P, H, G * W)
        x = self.mix(x.permute(0, 3, 1, 2))  # -> (B, G * W, P, H), a map with P rows and H columns
        x = x.permute(0, 2, 3, 1).unflatten(3, (self.mix.groups, -1))  # -> (B, P, H, G * W') -> (B, P, H, G, W')
        x = x.permute(0, 2, 4, 1, 3)  # (B, P, H, G, W') -> (B, H, W', P, G)
        return x.transpose(1, 2) if self.axis == "column" else x


def split_patches(x: Tensor, num_patches: int) -> Tensor:
    """Return the channels of ``x`` cut into patches, (B, D, H, W) -> (B, H, W, P, G), a view."""
    return x.permute(0, 2, 3, 1).unflatten(3, (num_patches, -1))  # (B, D, H, W) -> (B, H, W, D) -> (B, H, W, P, G)


def cat_channels(*maps: Tensor) -> Tensor:
    """Concatenate the channels of n maps that come in patches, n x (B, H, W, P, G) -> (B, n * D, H, W)."""
    x = torch.cat(maps, dim=3).flatten(3)  # n x (B, H, W, P, G) -> (B, H, W, n * P, G) -> (B, H, W, n * D)
    return x.permute(0, 3, 1, 2)  # (B, H, W, n * D) -> (B, n * D, H, W)


class CGSMM(nn.Module):
    """Cascade group strip mixing module (sec. 3.3): rows first, then columns over the result.

    Args:
        dim: channels D.
        size: (H, W) of the map.
        num_patches: patches P of the Strip MLP layers.
        strip_width: rows (then columns) that a token sees, odd.
    Shape: (B, D, H, W) -> same.
    """

    def __init__(self, dim: int, size: int | tuple[int, int], num_patches: int, *, strip_width: int = 3) -> None:
        super().__init__()
        height, width = to_2tuple(size)
        self.row_position = RelativePosition(dim, size)
        self.row_mix = StripMLPLayer(dim, width, num_patches, "row", strip_width=strip_width)
        self.row_fuse = nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.column_position = RelativePosition(dim, size)
        self.column_mix = StripMLPLayer(dim, height, num_patches, "column", strip_width=strip_width)
        self.column_fuse = nn.Conv2d(2 * dim, dim, 1, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        patches = split_patches(u, self.row_mix.num_patches)  # (B, D, H, W) -> (B, H, W, P, G)
        rows = self.row_mix(self.row_position(u))  # (B, D, H, W) -> (B, H, W, P, G)
        q = F.gelu(self.norm(self.row_fuse(cat_channels(rows, patches))))
        columns = self.column_mix(self.column_position(q))  # (B, D, H, W) -> (B, H, W, P, G)
        return self.column_fuse(cat_channels(patches, columns))


class LSMM(nn.Module):
    """Local strip mixing module (sec. 3.4): a tall and a wide depthwise convolution and their input, reweighted.

    The three weights of a sample and channel are a softmax, computed from the mean of the branches over space.

    Args:
        dim: channels D, even.
    Shape: (B, D, H, W) -> same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tall = DepthwiseConv2d(dim, (7, 3))
        self.wide = DepthwiseConv2d(dim, (3, 7))
        self.reweight1 = nn.Conv2d(dim, dim // 2, 1)
        self.reweight2 = nn.Conv2d(dim // 2, 3 * dim, 1)

    def weights(self, pooled: Tensor) -> Tensor:
        """Return the branches' weights from the mean over space of their sum, (B, D, 1, 1) -> (B, D, 3, 1, 1)."""
        z = self.reweight2(F.gelu(self.reweight1(pooled)))
        return _softmax(z.unflatten(1, (-1, 3)), dim=2)  # (B, 3 * D, 1, 1) -> (B, D, 3, 1, 1)

    def forward(self, v: Tensor) -> Tensor:
        tall, wide = self.tall(v), self.wide(v)
        pooled = mean_over_space(tall) + mean_over_space(wide) + mean_over_space(v)
        w_tall, w_wide, w_v = self.weights(pooled).unbind(dim=2)
        return torch.addcmul(torch.addcmul(w_tall * tall, w_wide, wide), w_v, v)  # w_tall tall + w_wide wide + w_v v


@torch.fx.wrap  # a tracer could not follow what depends on the input's device
def _softmax(x: Tensor, dim: int) -> Tensor:
    with autocast_off(x.device.type):  # which on a GPU would copy x to float32, in which the kernel computes anyway
        return x.softmax(dim)


TOKEN_MIXINGS = ("both", "cgsmm", "lsmm")


class StripMixingBlock(nn.Module):
    """Token mixing (sec. 3.1): local convolution, projection, then CGSMM and LSMM on half of the channels each, fused.

    For ablations, one of the two modules may work alone: the half of the other one then goes into the fusion as it is.
    So nothing but that module is missing; every width stays, and parameters and computation fall by its share. How the
    paper's own ablation was built is not known; giving all channels to one module would also double its width.

    Args:
        dim: channels C, even.
        size: (H, W) of the map.
        num_patches: patches P of the Strip MLP layers, a divisor of C / 2.
        strip_width: strip width of these layers, odd.
        token_mixing: ``"both"``, or the module that works alone, ``"cgsmm"`` or ``"lsmm"``.
    Shape: (B, C, H, W) -> same.
    Raises:
        ValueError: if ``dim`` is odd, ``num_patches`` does not divide C / 2, or ``token_mixing`` is unknown.
    """

    def __init__(
        self,
        dim: int,
        size: int | tuple[int, int],
        num_patches: int,
        *,
        strip_width: int = 3,
        token_mixing: str = "both",
    ) -> None:
        super().__init__()
        if dim % 2 != 0:
            raise ValueError(f"{dim} channels cannot be split in two halves; choose an even number")
        if token_mixing not in TOKEN_MIXINGS:
            raise ValueError(f"token_mixing is {token_mixing!r}; known: {', '.join(map(repr, TOKEN_MIXINGS))}")
        half = dim // 2
        self.norm1 = nn.BatchNorm2d(dim)
        self.dwconv = DepthwiseConv2d(dim, (3, 3))
        self.project = nn.Conv2d(dim, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        without_cgsmm, without_lsmm = token_mixing == "lsmm", token_mixing == "cgsmm"
        self.cgsmm = nn.Identity() if without_cgsmm else CGSMM(half, size, num_patches, strip_width=strip_width)
        self.lsmm = nn.Identity() if without_lsmm else LSMM(half)
        self.fuse = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.project(self.dwconv(F.gelu(self.norm1(x)))))
        u, v = x.chunk(2, dim=1)  # (B, C, H, W) -> 2 x (B, D, H, W)
        u, v = F.gelu(u), F.gelu(v)
        return self.fuse(torch.cat([self.cgsmm(u), self.lsmm(v)], dim=1))  # 2 x (B, D, H, W) -> (B, C, H, W)


class ChannelMixingBlock(nn.Module):
    """Channel mixing (sec. 3.1): depthwise 7x7 convolution, LayerNorm and an MLP with GRN, after ConvNeXt V2.

    Args:
        dim: channels C.
        hidden_dim: channels K between the two linear layers.
    Shape: (B, C, H, W) -> same.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim, (7, 7))
        self.norm = ChannelLayerNorm(dim)
        self.fc1 = PointwiseLinear(dim, hidden_dim)
        self.grn = GRN(hidden_dim)
        self.fc2 = PointwiseLinear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.dwconv(x))
        return self.fc2(self.grn(F.gelu(self.fc1(x))))  # (B, C, H, W) -> (B, K, H, W) -> (B, C, H, W)


class StripMLPBlock(nn.Module):
    """One block (fig. 2): strip mixing, then channel mixing, each added to its input.

    Args:
        dim: channels C.
        size: (H, W) of the map.
        num_patches: patches P of the Strip MLP layers.
        strip_width: strip width of these layers, odd.
        token_mixing: ``"both"``, or the module of the strip mixing that works alone, ``"cgsmm"`` or ``"lsmm"``.
        mlp_ratio: hidden channels of the channel mixing over C (alpha in the paper).
        drop_path: probability that a sample skips a branch in training.
    Shape: (B, C, H, W) -> same.
    """

    def __init__(
        self,
        dim: int,
        size: int | tuple[int, int],
        num_patches: int,
        *,
        strip_width: int = 3,
        token_mixing: str = "both",
        mlp_ratio: float = 3,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.strip_mixing = StripMixingBlock(dim, size, num_patches, strip_width=strip_width, token_mixing=token_mixing)
        self.channel_mixing = ChannelMixingBlock(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = add_residual(x, self.strip_mixing(x), self.drop_path)
        return add_residual(x, self.channel_mixing(x), self.drop_path)
