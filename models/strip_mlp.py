"""The network of "Strip-MLP: Efficient Token Interaction for Vision MLP" (Cao et al., ICCV 2023, arXiv 2307.11458).

Its parts are in ``models.blocks``. Importing this module registers the variants with timm, so that
``timm.create_model("strip_mlp_tiny")`` works.

Legend: B batch, C channels, H rows, W columns. Inputs may come in any memory order; all maps inside are (B, C, H, W) in
channels_last order.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .blocks import StripMLPBlock
from .checkpoint_compat import from_published
from .layers import checkpointed, downsample, drop_path_rates
from .resample import resample_weights, set_map_size

__all__ = ["StripMLPNet"]


def published_num_patches(channels: int) -> int:
    """Return the patches P of a stage in the published networks: 2 where 80 divides its channels, else 4."""
    return 2 if channels % 80 == 0 else 4


def image_sides(img_size: int | tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return (H, W) in pixels of an image size given as a pair, or as one number for a square.

    Raises:
        ValueError: if a side is not a positive multiple of ``multiple``.
    """
    sides = to_2tuple(img_size)
    if len(sides) != 2:
        raise ValueError(f"img_size is {img_size}; give one number, or the two of (height, width)")
    near = [max(multiple, round(side / multiple) * multiple) for side in sides]
    if list(sides) != near:
        given, use = (sides[0], near[0]) if sides[0] == sides[1] else (sides, tuple(near))
        raise ValueError(f"img_size is {given}, which is not a multiple of {multiple} (8 * patch_size); use {use}")
    return sides


def _check_arguments(
    in_chans: int, num_classes: int, embed_dim: int, depths: Sequence[int], mlp_ratio: float, drop_rate: float
) -> None:
    """Raise one ValueError that lists every argument that is out of range."""
    problems = [
        f"{name} is {value}; it must be {rule}"
        for name, value, good, rule in (
            ("in_chans", in_chans, in_chans > 0, "positive"),
            ("num_classes", num_classes, num_classes >= 0, "positive, or 0 for no head"),
            ("embed_dim", embed_dim, embed_dim > 0 and embed_dim % 2 == 0, "positive and even, to be halved"),
            ("depths", tuple(depths), len(depths) == 4 and min(depths) > 0, "four positive numbers of blocks"),
            ("mlp_ratio", mlp_ratio, int(mlp_ratio * embed_dim) > 0, "large enough for one hidden channel"),
            ("drop_rate", drop_rate, 0.0 <= drop_rate < 1.0, "in [0, 1)"),
        )
        if not good
    ]
    if problems:
        raise ValueError("; ".join(problems))


class StripMLPNet(nn.Module):
    """The network (fig. 2): a patch embedding, four stages with merging between them, a linear head.

    Skips by grouped convolution, in the published code though not in the figure, carry the merged output of stage 1 to
    stages 3 and 4, and that of stage 2 to stage 4.

    Args:
        img_size: (H, W) of the input, or one number for a square; multiples of 8 * patch_size. The strip mixing weights
            belong to this size; ``set_input_size`` resamples them for another.
        patch_size: side of the non-overlapping patches of the embedding.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0 leaves the head out.
        embed_dim: channels C of the first stage, doubled in each further one.
        depths: blocks in each of the four stages.
        mlp_ratio: hidden channels of the channel mixing over C (alpha in the paper).
        num_patches: patches P in every stage; None follows the published rule (2 where 80 divides C, else 4).
        drop_rate: dropout before the head.
        drop_path_rate: probability that a sample skips a branch in training.
        drop_path_schedule: ``"constant"``, the rate in every block as published, or ``"linear"``, from 0 up to it.
    Shape: (B, in_chans, *img_size) -> (B, num_classes).
    Raises:
        ValueError: if an argument is out of range, or the sizes do not divide.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 80,
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratio: float = 3,
        num_patches: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_schedule: str = "constant",
    ) -> None:
        super().__init__()
        _check_arguments(in_chans, num_classes, embed_dim, depths, mlp_ratio, drop_rate)
        self.img_size, self.in_chans, self.num_classes = image_sides(img_size, 8 * patch_size), in_chans, num_classes
        self.num_features = self.head_hidden_size = 8 * embed_dim
        self.grad_checkpointing = False
        rates = iter(drop_path_rates(drop_path_rate, sum(depths), drop_path_schedule))
        dims = [embed_dim * 2**stage for stage in range(4)]
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**stage, "module": f"stages.{stage}"}
            for stage, dim in enumerate(dims)
        ]
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=False)
        self.stages = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            size = tuple(side // (patch_size * 2**stage) for side in self.img_size)
            patches = num_patches or published_num_patches(dim)
            block = partial(StripMLPBlock, dim, size, patches, mlp_ratio=mlp_ratio)
            self.stages.append(nn.Sequential(*(block(drop_path=next(rates)) for _ in range(depth))))
        self.merging = nn.ModuleList(downsample(dim) for dim in dims[:3])
        self.skip_1_to_3 = downsample(dims[1], groups=dims[1])
        self.skip_1_to_4 = downsample(dims[2], groups=dims[2])
        self.skip_2_to_4 = downsample(dims[2], groups=dims[2])
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised map of stage 4, (B, in_chans, *img_size) -> (B, 8 * embed_dim, H, W)."""
        if not x.is_floating_point():
            raise ValueError(f"input of {x.dtype}; this network takes normalised floating point images")
        if x.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"input of shape {tuple(x.shape)}, but this network takes (batch, {self.in_chans}, {self.img_size[0]}, "
                f"{self.img_size[1]}); resize the images, or the network with set_input_size"
            )
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        stage1 = self._run_stage(0, x.contiguous(memory_format=torch.channels_last))
        merged1 = self.merging[0](stage1)
        merged2 = self.merging[1](self._run_stage(1, merged1))
        skip = self.skip_1_to_3(merged1)
        stage3 = self._run_stage(2, merged2 + skip)
        x = self.merging[2](stage3) + self.skip_1_to_4(skip) + self.skip_2_to_4(merged2)
        return self.norm(self._run_stage(3, x))

    def _run_stage(self, stage: int, x: Tensor) -> Tensor:
        """Run the blocks of one stage. Shape: (B, C, H, W) -> same."""
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return self.stages[stage](x)
        for block in self.stages[stage]:
            x = checkpointed(block, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Apply mean over space, dropout and, unless ``pre_logits``, the head.

        Shape: (B, 8 * embed_dim, H, W) -> (B, num_classes), or (B, 8 * embed_dim) with ``pre_logits``.
        """
        x = self.head_drop(x.mean(dim=(2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one with ``num_classes`` outputs, or by the identity if that is 0."""
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(self.norm.weight.device, self.norm.weight.dtype)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make this a network for images of another size.

        Its strip mixing weights are resampled and become new parameters, so build optimizers after this, not before.

        Args:
            img_size: (H, W) in pixels, or one number for a square.
        """
        patch_size = self.patch_embed.kernel_size[0]
        self.img_size = image_sides(img_size, 8 * patch_size)
        for stage, blocks in enumerate(self.stages):
            for block in blocks:
                set_map_size(block.strip_mixing.cgsmm, *(side // (patch_size * 2**stage) for side in self.img_size))
        if hasattr(self, "_traits"):  # what timm 1.0.31 and later keep of the size a model was made with
            self._traits = {**self._traits, "img_size": self.img_size}
            self._model_args = {**self._model_args, "img_size": self.img_size}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, which then runs the block a second time."""
        self.grad_checkpointing = enable

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place (``torch.compile`` with ``options``); blocks of a stage share their graphs."""
        for stage in self.stages:
            for block in stage:
                block.compile(**options)

    def to_inference(self) -> nn.Module:
        """Return a copy for inference alone in which everything constant is folded: the same scores, faster."""
        from .fast import InferenceStripMLP

        return InferenceStripMLP(self)

    def no_weight_decay(self) -> set[str]:
        """Return the names exempt from weight decay beyond 1-D parameters and biases: none, as published."""
        return set()


def _pretrained_cfg() -> dict[str, Any]:
    """Return what timm's data and fine-tuning tools need to know; no weights are hosted for these models."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {f"strip_mlp_{variant}": _pretrained_cfg() for variant in ("tiny_light", "tiny", "small", "base")}
)


def _pretrained_filter(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give loaded weights our names, and the size of the model's images; timm adapts stem and head."""
    return resample_weights(from_published(state_dict), model)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> StripMLPNet:
    return build_model_with_cfg(
        StripMLPNet,
        variant,
        pretrained,
        pretrained_filter_fn=_pretrained_filter,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "hook"},
        **kwargs,
    )


@register_model
def strip_mlp_tiny_light(pretrained: bool = False, **kwargs: Any) -> StripMLPNet:
    """Strip-MLP-T* (18 M parameters, 2.5 G multiply-accumulates at 224)."""
    return _create("strip_mlp_tiny_light", pretrained, **{"embed_dim": 80, "depths": (2, 2, 6, 2), **kwargs})


@register_model
def strip_mlp_tiny(pretrained: bool = False, **kwargs: Any) -> StripMLPNet:
    """Strip-MLP-T (25 M parameters, 3.7 G multiply-accumulates at 224)."""
    return _create("strip_mlp_tiny", pretrained, **{"embed_dim": 80, "depths": (2, 2, 12, 2), **kwargs})


@register_model
def strip_mlp_small(pretrained: bool = False, **kwargs: Any) -> StripMLPNet:
    """Strip-MLP-S (43 M parameters, 6.8 G multiply-accumulates at 224)."""
    return _create("strip_mlp_small", pretrained, **{"embed_dim": 96, "depths": (2, 2, 18, 2), **kwargs})


@register_model
def strip_mlp_base(pretrained: bool = False, **kwargs: Any) -> StripMLPNet:
    """Strip-MLP-B (57 M parameters, 9.2 G multiply-accumulates at 224)."""
    return _create("strip_mlp_base", pretrained, **{"embed_dim": 112, "depths": (2, 2, 18, 2), **kwargs})
