"""Show what a network looks at and what it has learned.

    python tools/visualize.py checkpoint_best.pth --show erf cam --images <folder> --vs resnet50 --output figures
    python tools/visualize.py checkpoint_best.pth --show strips

erf     effective receptive field of each stage, and the share of the area that holds most of it; --vs adds networks of
        timm with fresh weights at the same size
cam     Grad-CAM overlays: which pixels speak for the predicted class
strips  the strip weights and the position tables of each stage's last block, as maps
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a file, Python looks in tools/ only

import timm
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from data import build_batch_transform, build_transform, collate, decode_image, list_images, read_image_file
from inference import Opened
from models import StripMLPNet
from tools.common import (
    checkpoint_parser,
    make_folder,
    new_figure,
    open_from,
    png_bytes,
    printable,
    progress,
    run_tool,
    write_bytes,
)
from utils.errors import RunError

SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contribution, for the high-contribution area ratio
BATCH = 8  # images


def stages_of(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Return the modules whose outputs are the maps of the last four stages, each with its channels.

    Raises:
        RunError: the network does not name them, as timm's do in ``feature_info``.
    """
    info = getattr(model, "feature_info", None)
    if not info:
        raise RunError(
            f"{type(model).__name__} does not say what its stages are (feature_info); choose another network"
        )
    entries = getattr(info, "info", info)[-4:]
    return [(model.get_submodule(entry["module"]), entry["num_chs"]) for entry in entries]


def receptive_fields(model: nn.Module, batches: Iterator[Tensor]) -> list[Tensor]:
    """Return each stage's effective receptive field, (H, W) in the pixels of the input.

    As RepLKNet's ``erf/visualize_erf.py``: the positive part of the gradient, by the input, of the summed positive
    values of the centre unit; summed over channels, mean over images.

    Args:
        model: in evaluation mode.
        batches: normalised images (B, 3, H, W).
    """
    stages, maps, sums, count = stages_of(model), {}, [], 0
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, number=number: maps.update({number: output}))
        for number, (module, _) in enumerate(stages)
    ]
    try:
        for images in batches:
            images.requires_grad_(True)
            model(images)
            fields = []
            for number, (_, channels) in enumerate(stages):
                found = as_map(maps[number], channels)
                unit = found[:, :, found.shape[2] // 2, found.shape[3] // 2].relu().sum()
                gradient = torch.autograd.grad(unit, images, retain_graph=number + 1 < len(stages))[0]
                fields.append(gradient.relu().sum(dim=(0, 1)).double().cpu())
            sums = [old + new for old, new in zip(sums, fields, strict=True)] if sums else fields
            count += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [field / count for field in sums]


def as_map(output: Tensor, channels: int) -> Tensor:
    """Return a stage's output as a map (B, C, H, W); it may be (B, H, W, C), or tokens (B, N, C) of a square grid."""
    if output.ndim == 3:  # tokens of classes come first
        side = math.isqrt(output.shape[1])
        output = output[:, output.shape[1] - side * side :].unflatten(1, (side, side))
    return output if output.shape[1] == channels else output.permute(0, 3, 1, 2)


def area_ratio(field: Tensor, share: float) -> float:
    """Return the share of the area of the smallest centred square that holds ``share`` of ``log10(field + 1)``.

    As RepLKNet's ``erf/analyze_erf.py``, which takes the logarithm before it adds up.
    """
    values = (field + 1).log10()
    height, width = values.shape
    for half in range(max(height, width)):
        rows = slice(max(0, height // 2 - half), height // 2 + half + 1)
        columns = slice(max(0, width // 2 - half), width // 2 + half + 1)
        square = values[rows, columns]
        if square.sum() >= share * values.sum():
            return square.numel() / values.numel()
    return 1.0


def draw_fields(fields: dict[str, list[Tensor]]) -> Figure:
    """Return the fields on a logarithmic scale, networks in rows, stages in columns."""
    columns = max(map(len, fields.values()))
    figure, axes = grid(len(fields), columns)
    for row, (name, stages) in enumerate(fields.items()):
        for stage, field in enumerate(stages):
            scaled = (field / field.max().clamp(min=1e-30)).clamp(min=1e-4)
            axes[row][stage].imshow(scaled.numpy(), norm=LogNorm(1e-4, 1), cmap="inferno")
            ratio = area_ratio(field, 0.99)
            axes[row][stage].set_title(f"{name[:34]}\nstage {stage + 1}, 99 % in {ratio:.0%} of the area", fontsize=8)
    return figure


def grid(rows: int, columns: int) -> tuple[Figure, Any]:
    """Return a figure of rows and columns of maps, without ticks, and its axes by row and column."""
    figure = new_figure(2.4 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def draw_strips(model: StripMLPNet) -> Figure:
    """Return the strip weights of each stage's last block: mean magnitude over the channels, output by input token."""
    figure, axes = grid(len(model.stages), 6)
    for row, stage in enumerate(model.stages):
        cgsmm = stage[-1].strip_mixing.cgsmm
        for part, layer in enumerate((cgsmm.row_mix, cgsmm.column_mix)):
            weight = layer.mix.weight.detach().cpu().squeeze(2)  # (G * W', W, 1, 3) -> (G * W', W, 3)
            maps = weight.unflatten(0, (layer.mix.groups, -1)).abs().mean(dim=0)  # -> (G, W', W, 3) -> (W', W, 3)
            for place in range(maps.shape[2]):
                ax = axes[row][3 * part + place]
                ax.imshow(maps[:, :, place].numpy(), cmap="viridis", vmin=0, vmax=maps.max().item())
                line = ("row", "column")[part]
                ax.set_title(
                    f"stage {row + 1}, {(f'{line} before', f'own {line}', f'{line} after')[place]}", fontsize=8
                )
    return figure


def draw_positions(model: StripMLPNet) -> Figure:
    """Return the relative position tables of each stage's last block: offset by channel."""
    figure, axes = grid(len(model.stages), 2)
    for row, stage in enumerate(model.stages):
        cgsmm = stage[-1].strip_mixing.cgsmm
        for part, position in enumerate((cgsmm.row_position, cgsmm.column_position)):
            table = position.table.detach().cpu()
            limit = table.abs().max().item()
            axes[row][part].imshow(table.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
            axes[row][part].set_title(f"stage {row + 1}, {('rows', 'columns')[part]}: offset x channel", fontsize=8)
    return figure


def prepared_images(opened: Opened, paths: Sequence[str]) -> Iterator[Tensor]:
    """Yield batches of images as evaluation prepares them, on the device."""
    transform = build_transform(opened.config, is_train=False)
    batch_transform = build_batch_transform(opened.config, is_train=False, device=opened.device)
    for start in progress(range(0, len(paths), BATCH), desc="images", unit="batch"):
        chosen = paths[start : start + BATCH]
        pixels = [transform(decode_image(read_image_file(path), as_array=True)) for path in chosen]
        yield batch_transform(*collate([(picture, 0, 0) for picture in pixels]))[0]


def draw_cams(opened: Opened, paths: Sequence[str]) -> Figure:
    """Return Grad-CAM overlays for the predicted class, from the map of the last stage.

    Raises:
        RunError: the package is missing.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.image import show_cam_on_image
    except ImportError as error:
        raise RunError("Grad-CAM needs the package grad-cam; see requirements-extra.txt") from error
    layer, channels = stages_of(opened.model)[-1]
    mean, std = (torch.tensor(opened.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    figure, axes = grid(-(-len(paths) // 6), min(6, len(paths)))
    places = iter(axes.flat)
    with GradCAM(opened.model, [layer], reshape_transform=lambda output: as_map(output, channels)) as cam:
        for images in prepared_images(opened, paths):
            masks = cam(input_tensor=images, targets=None)  # for the class with the largest score
            best = opened.model(images).softmax(dim=1).max(dim=1)
            for image, mask, share, label in zip(images.cpu(), masks, *(part.tolist() for part in best), strict=True):
                pixels = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
                ax = next(places)
                ax.imshow(show_cam_on_image(pixels, mask, use_rgb=True))
                ax.set_title(f"{printable(opened.names[label])[:30]} {share:.0%}", fontsize=8, parse_math=False)
    return figure


def fields_of(opened: Opened, others: Sequence[str], paths: Sequence[str]) -> dict[str, list[Tensor]]:
    """Return the receptive fields of the checkpoint and of fresh timm models, and print their area ratios."""
    models = {opened.config.MODEL.NAME: opened.model}
    for name in others:
        fixed = timm.get_pretrained_cfg(name)
        size = {"img_size": opened.config.DATA.IMG_SIZE} if fixed is not None and fixed.fixed_input_size else {}
        models[f"{name} (not trained)"] = timm.create_model(name, **size).to(opened.device).eval()
    fields = {name: receptive_fields(model, prepared_images(opened, paths)) for name, model in models.items()}
    print("share of the area that holds this share of the contribution:")
    for name, stages in fields.items():
        for stage, field in enumerate(stages):
            ratios = "  ".join(f"{share:.0%}: {area_ratio(field, share):6.1%}" for share in SHARES)
            print(f"{name}, stage {stage + 1}:  {ratios}")
    return fields


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--show", nargs="+", choices=("erf", "cam", "strips"), required=True, help="see above")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images, at any depth, for erf and cam")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="at most so many images (%(default)s)")
    parser.add_argument("--vs", nargs="+", default=[], metavar="NAME", help="timm models to compare with, for erf")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="FOLDER", help="(default: %(default)s)")
    return parser


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    paths: list[str] = []
    if {"erf", "cam"} & set(args.show):
        if args.images is None:
            raise ValueError("erf and cam need --images FOLDER")
        paths = [str(args.images / path) for path in list_images(args.images).images]
        paths = paths[:: max(1, len(paths) // args.count)][: args.count]  # from all classes
        if not paths:
            raise ValueError(f"--images {args.images} has no images")
    unknown = [name for name in args.vs if not timm.is_model(name)]
    if unknown:
        raise ValueError(f"--vs {unknown[0]}: timm knows no such model; timm.list_models() lists the names")
    opened, folder = open_from(args), make_folder(args.output)
    figures = {}
    if "erf" in args.show:
        figures["erf"] = draw_fields(fields_of(opened, args.vs, paths))
    if "cam" in args.show:
        figures["cam"] = draw_cams(opened, paths)
    if "strips" in args.show:
        if not isinstance(opened.model, StripMLPNet):
            raise ValueError(f"{opened.config.MODEL.NAME} is not a Strip-MLP: it has no strips")
        figures["strip_weights"], figures["position_tables"] = draw_strips(opened.model), draw_positions(opened.model)
    for name, figure in figures.items():
        write_bytes(folder / f"{name}.png", png_bytes(figure))
        print(f"written to {folder / f'{name}.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(command))
