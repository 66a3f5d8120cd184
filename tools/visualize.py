"""Show what a network looks at and what it has learned.

    python tools/visualize.py checkpoint_best.pth --show erf cam --images <folder> --vs resnet50 --output figures
    python tools/visualize.py checkpoint_best.pth --show strips

erf     effective receptive field of each stage, and the share of the area that holds most of it; --vs adds other
        checkpoints, or networks of timm with fresh weights, at the same size
cam     Grad-CAM overlays: which pixels speak for the predicted class
strips  the strip weights and the position tables of each stage's last block, as maps
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a file, Python looks in tools/ only

import timm
from matplotlib.figure import Figure
from torch import Tensor, nn

from data import (
    build_batch_transform,
    build_dataset,
    build_transform,
    collate,
    decode_image,
    expanded_path,
    list_images,
    read_image_file,
)
from inference import Opened, open_checkpoint
from models import StripMLPNet
from tools.class_activation import draw_cams
from tools.common import (
    checkpoint_parser,
    make_folder,
    open_from,
    progress,
    run_tool,
    whole_number,
    write_bytes,
)
from tools.figures import png_bytes
from tools.receptive_field import area_ratio, draw_fields, receptive_fields
from tools.strip_maps import draw_positions, draw_strips
from utils.config import input_shape
from utils.errors import ImageReadError
from utils.runtime import printable

SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contribution, for the high-contribution area ratio
BATCH = 8  # images


def chosen_images(opened: Opened, folder: Path | None, count: int) -> list[tuple]:
    """Return at most ``count`` prepared images of a folder, or of the validation set, spread over it, for ``batches``.

    Raises:
        ValueError: there is no such folder, or no image in it.
        ImageReadError: an image cannot be read.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--images {folder} is not a folder")
    if folder is None:
        dataset = build_dataset(opened.config, is_train=False)
        return [dataset[index] for index in spread(range(len(dataset)), count)]
    names = spread(list_images(folder).images, count)
    if not names:
        raise ValueError(f"--images {folder} has no images")
    transform, channels = build_transform(opened.config, is_train=False), input_shape(opened.config)[0]
    return [(transform(picture_in(folder / name, channels)), 0, 0) for name in names]


def picture_in(file: Path, channels: int) -> Any:
    """Return the decoded picture of a file.

    Raises:
        ImageReadError: it cannot be read; names it.
    """
    try:
        return decode_image(read_image_file(str(file)), as_array=True, channels=channels)
    except ImageReadError as error:
        raise ImageReadError(
            f"cannot read image {printable(str(file))}: {error}. tools/check_data.py lists all such files"
        ) from error


def spread(items: Sequence, count: int) -> Sequence:
    """Return at most ``count`` items at equal distances, so that all classes of a sorted list have a part."""
    return items[:: max(1, len(items) // count)][:count]


def batches(opened: Opened, images: Sequence[tuple]) -> Iterator[Tensor]:
    """Yield normalised batches (B, C, H, W) on the device."""
    transform = build_batch_transform(opened.config, is_train=False, device=opened.device)
    for start in progress(range(0, len(images), BATCH), desc="images", unit="batch"):
        yield transform(*collate(images[start : start + BATCH]))[0]


def compared(opened: Opened, name: str) -> tuple[str, nn.Module]:
    """Return the label and the network of one ``--vs``: of another checkpoint, or a fresh one of timm.

    Raises:
        ValueError: the other checkpoint is for another image size.
    """
    size = opened.config.DATA.IMG_SIZE
    if Path(name).is_file():
        other = open_checkpoint(name, device=opened.device)
        if other.config.DATA.IMG_SIZE != size:
            raise ValueError(f"--vs {name} is for images of {other.config.DATA.IMG_SIZE} pixels, not {size}")
        return "/".join(Path(name).resolve().with_suffix("").parts[-2:]), other.model
    fixed = timm.get_pretrained_cfg(name)
    args = {"img_size": size} if fixed is not None and fixed.fixed_input_size else {}
    return f"{name} (not trained)", timm.create_model(name, **args).to(opened.device).eval()


def fields_of(opened: Opened, others: Sequence[str], images: Sequence[tuple]) -> dict[str, list[Tensor]]:
    """Return the receptive fields of the checkpoint and of other networks, and print their area ratios."""
    models = {opened.model_name: opened.model} | dict(compared(opened, name) for name in others)
    if len(models) <= len(others):
        raise ValueError(f"--vs {' '.join(others)}: two networks have the same name; compare them one by one")
    fields = {name: receptive_fields(model, batches(opened, images)) for name, model in models.items()}
    print("share of the area that holds this share of the contribution:")
    for name, stages in fields.items():
        for stage, field in enumerate(stages):
            ratios = "  ".join(f"{100 * share:.0f} %: {100 * area_ratio(field, share):5.1f} %" for share in SHARES)
            print(f"{name}, stage {stage + 1}:  {ratios}")
    return fields


def drawn(opened: Opened, args: argparse.Namespace) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of everything that ``--show`` names."""
    images = chosen_images(opened, args.images, args.count) if {"erf", "cam"} & set(args.show) else []
    if "strips" in args.show:
        yield "strip_weights", draw_strips(opened.model)
        yield "position_tables", draw_positions(opened.model)
    if "erf" in args.show:
        yield "erf", draw_fields(fields_of(opened, args.vs, images))
    if "cam" in args.show:
        yield "cam", draw_cams(opened, batches(opened, images), len(images))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--show", nargs="+", choices=("erf", "cam", "strips"), required=True, help="see above")
    parser.add_argument("--images", type=expanded_path, metavar="FOLDER", help="images, at any depth, for erf and cam")
    parser.add_argument("--data-path", metavar="FOLDER", help="without --images: data set, of which val/ is used")
    parser.add_argument("--count", type=whole_number(1, 1000), default=24, metavar="N", help="images (%(default)s)")
    parser.add_argument("--vs", nargs="+", default=[], metavar="NAME|FILE", help="for erf: timm models, checkpoints")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="FOLDER", help="(default: %(default)s)")
    return parser


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    unknown = [name for name in args.vs if not (timm.is_model(name) or Path(name).is_file())]
    if unknown:
        raise ValueError(
            f"--vs {unknown[0]} is neither a file nor a model of timm, whose names timm.list_models() lists"
        )
    opened = open_from(args, **({"DATA__DATA_PATH": args.data_path} if args.data_path else {}))
    if "strips" in args.show and not isinstance(opened.model, StripMLPNet):
        raise ValueError(f"--show strips: {opened.model_name} is not a Strip-MLP and has no strips")
    folder = make_folder(args.output)
    for name, figure in drawn(opened, args):
        write_bytes(folder / f"{name}.png", png_bytes(figure))
        print(f"written to {folder / f'{name}.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(command))
