"""The network of "Strip-MLP: Efficient Token Interaction for Vision MLP" (Cao et al., ICCV 2023, arXiv 2307.11458).

Its parts are in ``models.blocks``. Importing this module registers the variants with timm, so that
``timm.create_model("strip_mlp_tiny")`` works.

Legend: B batch, C channels, H rows, W columns. Inputs may come in any memory order; all maps inside are (B, C, H, W) in
channels_last order.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .blocks import StripMLPBlock
from .checkpoint_compat import from_published
from .features import StripMLPFeatures
from .layers import NoSkip, checkpointed, downsample, drop_path_rates
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


POOLINGS = ("avg", "")


def _check_arguments(
    in_chans: int,
    num_classes: int,
    embed_dim: int,
    depths: Sequence[int],
    mlp_ratio: float,
    drop_rate: float,
    global_pool: str,
) -> None:
    """Raise one ValueError that lists every argument that is out of range."""
    problems = [
        f"{name} is {value!r}; it must be {rule}"
        for name, value, good, rule in (
            ("in_chans", in_chans, in_chans > 0, "positive"),
            ("num_classes", num_classes, num_classes >= 0, "positive, or 0 for no head"),
            ("embed_dim", embed_dim, embed_dim > 0 and embed_dim % 2 == 0, "positive and even, to be halved"),
            ("depths", tuple(depths), len(depths) == 4 and min(depths) > 0, "four positive numbers of blocks"),
            ("mlp_ratio", mlp_ratio, int(mlp_ratio * embed_dim) > 0, "large enough for one hidden channel"),
            ("drop_rate", drop_rate, 0.0 <= drop_rate < 1.0, "in [0, 1)"),
            ("global_pool", global_pool, global_pool in POOLINGS, "'avg', or '' for none"),
        )
        if not good
    ]
    if problems:
        raise ValueError("; ".join(problems))


@torch.fx.wrap  # a tracer could not follow what depends on the shape of the input
def _checked_images(x: Tensor, in_chans: int, img_size: tuple[int, int]) -> Tensor:
    """Return the images in channels_last memory order.

    Args:
        x: normalised images, (B, in_chans, *img_size).
        in_chans: channels that the network takes.
        img_size: (H, W) that it takes.
    Raises:
        ValueError: if the images are whole numbers, or of another shape.
    """
    if not x.is_floating_point():
        raise ValueError(f"input of {x.dtype}; this network takes normalised floating point images")
    if x.shape[1:] != (in_chans, *img_size):
        raise ValueError(
            f"input of shape {tuple(x.shape)}, but this network takes (batch, {in_chans}, {img_size[0]}, "
            f"{img_size[1]}); resize the images, or the network with set_input_size"
        )
    return x.contiguous(memory_format=torch.channels_last)


def _begin_cuda_graphs(*_: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()


class StripMLPNet(nn.Module):
    """The network (fig. 2): a patch embedding, four stages with merging between them, a linear head.

    Skips by grouped convolution, in the published code though not in the figure, carry the merged output of stage 1 to
    stages 3 and 4, and that of stage 2 to stage 4. For ablations they can be left out, and the strip mixing changed.

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
        strip_width: strip width of the Strip MLP layers, odd.
        token_mixing: ``"both"``, or the module of each strip mixing block that works alone, ``"cgsmm"`` or ``"lsmm"``.
        stage_skips: whether there are skips past stages.
        drop_rate: dropout before the head.
        drop_path_rate: probability that a sample skips a branch in training.
        drop_path_schedule: ``"constant"``, the rate in every block as published, or ``"linear"``, from 0 up to it.
        global_pool: ``"avg"``, the mean over space before the head, or ``""``, none: the head scores each position.
        device: where the parameters are made.
        dtype: type of the parameters.
    Shape: (B, in_chans, *img_size) -> (B, num_classes), or (B, num_classes, H, W) without pooling.
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
        strip_width: int = 3,
        token_mixing: str = "both",
        stage_skips: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_schedule: str = "constant",
        global_pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(in_chans, num_classes, embed_dim, depths, mlp_ratio, drop_rate, global_pool)
        self.img_size, self.in_chans, self.num_classes = image_sides(img_size, 8 * patch_size), in_chans, num_classes
        self.num_features = self.head_hidden_size = 8 * embed_dim
        self.global_pool, self.grad_checkpointing = global_pool, False
        dims = [embed_dim * 2**stage for stage in range(4)]
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**stage, "module": f"stages.{stage}"}
            for stage, dim in enumerate(dims)
        ]
        variant = {"mlp_ratio": mlp_ratio, "strip_width": strip_width, "token_mixing": token_mixing}
        rates = iter(drop_path_rates(drop_path_rate, sum(depths), drop_path_schedule))
        with nullcontext() if device is None else torch.device(device):
            self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=False)
            self.stages = nn.ModuleList()
            for info, depth in zip(self.feature_info, depths, strict=True):
                size = tuple(side // info["reduction"] for side in self.img_size)
                patches = num_patches or published_num_patches(info["num_chs"])
                block = partial(StripMLPBlock, info["num_chs"], size, patches, **variant)
                self.stages.append(nn.Sequential(*(block(drop_path=next(rates)) for _ in range(depth))))
            self.merging = nn.ModuleList(downsample(dim) for dim in dims[:3])
            skips = [downsample(dim, groups=dim) if stage_skips else NoSkip() for dim in (dims[1], dims[2], dims[2])]
            self.skip_1_to_3, self.skip_1_to_4, self.skip_2_to_4 = skips
            self.norm = nn.BatchNorm2d(self.num_features)
            self.head_drop = nn.Dropout(drop_rate)
            self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.to(dtype=dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised map of stage 4, (B, in_chans, *img_size) -> (B, 8 * embed_dim, H, W)."""
        return self.norm(self._stage_maps(x, len(self.stages))[-1])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last map and the maps of chosen stages.

        Args:
            x: images, (B, in_chans, *img_size).
            indices: which stages, from 0, in rising order in the result; negative ones count from the end, a number n
                takes the last n, None all.
            norm: whether the map of stage 4 is normalised in the list too.
            stop_early: whether stages after the last chosen one are left out.
            output_fmt: ``"NCHW"``, (B, C, H, W).
            intermediates_only: whether the list is returned alone.

        Returns:
            The last map, normalised if it is stage 4's, and the list of the chosen ones.

        Raises:
            ValueError: if there is no such stage, or another ``output_fmt`` is asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; the maps of Strip-MLP are 'NCHW'")
        chosen = self._stage_indices(indices)
        maps = self._stage_maps(x, max(chosen) + 1 if stop_early else len(self.stages))
        complete = len(maps) == len(self.stages)
        last = self.norm(maps[-1]) if complete and (norm or not intermediates_only) else maps[-1]
        if norm:
            maps[-1] = last
        taken = [maps[stage] for stage in chosen]
        return taken if intermediates_only else (last, taken)

    def _stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Return the stages that ``indices`` of timm's kind stand for, in rising order and counted from 0."""
        try:
            return sorted(set(feature_take_indices(len(self.stages), indices)[0]))
        except (AssertionError, ValueError) as error:  # ValueError: none at all
            last = len(self.stages) - 1
            raise ValueError(f"indices (out_indices) are {indices}; this network has the maps 0 to {last}") from error

    def _stage_maps(self, x: Tensor, count: int) -> list[Tensor]:
        """Return the output of each of the first ``count`` stages."""
        x = self.patch_embed(_checked_images(x, self.in_chans, self.img_size))
        maps = [self._run_stage(0, x.contiguous(memory_format=torch.channels_last))]
        if count > 1:
            merged1 = self.merging[0](maps[0])
            maps.append(self._run_stage(1, merged1))
        if count > 2:
            merged2, skip = self.merging[1](maps[1]), self.skip_1_to_3(merged1)
            maps.append(self._run_stage(2, merged2 + skip))
        if count > 3:
            x = self.merging[2](maps[2]) + self.skip_1_to_4(skip) + self.skip_2_to_4(merged2)
            maps.append(self._run_stage(3, x))
        return maps

    def _run_stage(self, stage: int, x: Tensor) -> Tensor:
        """Run the blocks of one stage. Shape: (B, C, H, W) -> same."""
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return self.stages[stage](x)
        for block in self.stages[stage]:
            x = checkpointed(block, x)
        return x

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of the chosen stages do not need; every parameter that stays gets a gradient from them.

        Args:
            indices: the stages, as for ``forward_intermediates``.
            prune_norm: whether the last BatchNorm goes in any case; it goes with stage 4.
            prune_head: whether pooling and head go in any case; they go with stage 4.

        Returns:
            The chosen stages, counted from 0.
        """
        chosen = self._stage_indices(indices)
        count = max(chosen) + 1
        shortened = count < len(self.stages)
        if count < 4:
            self.skip_1_to_4, self.skip_2_to_4 = nn.Identity(), nn.Identity()
        if count < 3:
            self.skip_1_to_3 = nn.Identity()
        self.stages, self.merging = self.stages[:count], self.merging[: count - 1]
        if shortened or prune_norm:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[count - 1]["num_chs"]
        if shortened or prune_head:
            self.reset_classifier(0, "")
        return chosen

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Apply pooling, dropout and, unless ``pre_logits``, the head.

        Shape: (B, 8 * embed_dim, H, W) -> (B, num_classes), or (B, 8 * embed_dim) with ``pre_logits``; without pooling
        H and W stay.
        """
        x = self.head_drop(x.mean(dim=(2, 3)) if self.global_pool else x)
        if pre_logits:
            return x
        return self.head(x) if self.global_pool else self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one.

        Args:
            num_classes: outputs of the new head; 0 leaves it out.
            global_pool: ``"avg"``, or ``""`` for no pooling; None keeps what there is.

        Raises:
            ValueError: if ``global_pool`` is unknown.
        """
        if global_pool not in (None, *POOLINGS):
            raise ValueError(f"global_pool is {global_pool!r}; it must be 'avg', or '' for none")
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        like = self.patch_embed.weight
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(like.device, like.dtype)

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
                set_map_size(block.strip_mixing, *(side // (patch_size * 2**stage) for side in self.img_size))
        for kept in ("_traits", "_model_args"):  # what timm 1.0.31 and later keep of the size a model was made with
            if hasattr(self, kept):
                setattr(self, kept, {**getattr(self, kept), "img_size": self.img_size})

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, which then runs the block a second time."""
        self.grad_checkpointing = enable

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place (``torch.compile`` with ``options``); blocks of a stage share their graphs.

        With CUDA graphs (``mode="reduce-overhead"``), PyTorch has to be told where a forward pass begins: it would take
        each block for one, and reuse the memory of maps that later blocks read.
        """
        if options.get("mode") == "reduce-overhead":
            self.register_forward_pre_hook(_begin_cuda_graphs)
        for stage in self.stages:
            for block in stage:
                block.compile(**options)

    def to_inference(self) -> nn.Module:
        """Return a copy for inference alone in which everything constant is folded: the same scores, faster.

        Raises:
            ValueError: if the network was pruned, as by ``features_only``.
        """
        if isinstance(self.norm, nn.Identity):
            raise ValueError("to_inference takes a whole network, but parts of this one were pruned (features_only)")
        from .fast import InferenceStripMLP

        return InferenceStripMLP(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return which parameters form a layer, in order, as patterns of their names for timm's ``group_parameters``.

        A layer is the stem, a block (a stage if ``coarse``), or norm and head, which no pattern names. The mergings and
        skips that make a stage's input belong to its first block.
        """
        inputs = (r"^merging\.0", 1), (r"^(?:merging\.1|skip_1_to_3)", 2), (r"^(?:merging\.2|skip_[12]_to_4)", 3)
        blocks = [(pattern, (stage,) if coarse else (stage, 0)) for pattern, stage in inputs]
        blocks.append((r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None))
        return {"stem": r"^patch_embed", "blocks": blocks}

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


def _create(variant: str, pretrained: bool, **kwargs: Any) -> StripMLPNet | nn.Module:
    """Return the network, or with ``features_only`` its feature maps in timm's wrapper."""
    feature_cls = str(kwargs.get("feature_cls", "")).lower()  # as timm reads it
    if feature_cls in ("list", "dict"):
        raise ValueError(
            f"feature_cls is {feature_cls!r}, which runs the parts of a network in a row, but Strip-MLP has skips past "
            "stages; leave feature_cls out for a list of maps, or wrap it in models.DenseBackbone for a dict"
        )
    if feature_cls == "getter":
        del kwargs["feature_cls"]
    return build_model_with_cfg(
        StripMLPNet,
        variant,
        pretrained,
        pretrained_filter_fn=_pretrained_filter,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": StripMLPFeatures},
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
