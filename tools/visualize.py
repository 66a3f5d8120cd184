"""Show what a network looks at and what it has learned.

    python tools/visualize.py checkpoint_best.pth --show erf cam --images <folder> --vs resnet50 --output figures
    python tools/visualize.py checkpoint_best.pth --show strips

erf     effective receptive field of each stage, and the share of the area that holds most of it; --vs adds networks of
        timm with fresh weights at the same size
cam     Grad-CAM overlays: which pixels speak for the predicted class
strips  the strip weights and the position tables of each stage's last block, as maps
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a file, Python looks in tools/ only

import timm
from torch import Tensor

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
from inference import Opened
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

SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contribution, for the high-contribution area ratio
BATCH = 8  # images


def chosen_images(opened: Opened, folder: Path | None, count: int) -> list[tuple]:
    """Return at most ``count`` prepared images of a folder, or of the validation set, spread over it, for ``batches``.

    Raises:
        ValueError: the folder has no images.
    """
    if folder is None:
        dataset = build_dataset(opened.config, is_train=False)
        return [dataset[index] for index in spread(range(len(dataset)), count)]
    names = spread(list_images(folder).images, count)
    if not names:
        raise ValueError(f"--images {folder} has no images")
    transform, channels = build_transform(opened.config, is_train=False), input_shape(opened.config)[0]
    pictures = (decode_image(read_image_file(str(folder / name)), as_array=True, channels=channels) for name in names)
    return [(transform(picture), 0, 0) for picture in pictures]


def spread(items: Sequence, count: int) -> Sequence:
    """Return at most ``count`` items at equal distances, so that all classes of a sorted list have a part."""
    return items[:: max(1, len(items) // count)][:count]


def batches(opened: Opened, images: Sequence[tuple]) -> Iterator[Tensor]:
    """Yield normalised batches (B, C, H, W) on the device."""
    transform = build_batch_transform(opened.config, is_train=False, device=opened.device)
    for start in progress(range(0, len(images), BATCH), desc="images", unit="batch"):
        yield transform(*collate(images[start : start + BATCH]))[0]


def fields_of(opened: Opened, others: Sequence[str], images: Sequence[tuple]) -> dict[str, list[Tensor]]:
    """Return the receptive fields of the checkpoint and of fresh timm models, and print their area ratios."""
    models = {opened.config.MODEL.NAME: opened.model}
    for name in others:
        fixed = timm.get_pretrained_cfg(name)
        size = {"img_size": opened.config.DATA.IMG_SIZE} if fixed is not None and fixed.fixed_input_size else {}
        models[f"{name} (not trained)"] = timm.create_model(name, **size).to(opened.device).eval()
    fields = {name: receptive_fields(model, batches(opened, images)) for name, model in models.items()}
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
    parser.add_argument("--images", type=expanded_path, metavar="FOLDER", help="images, at any depth, for erf and cam")
    parser.add_argument("--data-path", metavar="FOLDER", help="without --images: data set, of which val/ is used")
    parser.add_argument("--count", type=whole_number(1, 1000), default=24, metavar="N", help="images (%(default)s)")
    parser.add_argument("--vs", nargs="+", default=[], metavar="NAME", help="timm models to compare with, for erf")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="FOLDER", help="(default: %(default)s)")
    return parser


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    unknown = [name for name in args.vs if not timm.is_model(name)]
    if unknown:
        raise ValueError(f"--vs {unknown[0]}: timm knows no such model; timm.list_models() lists the names")
    opened = open_from(args, **({"DATA__DATA_PATH": args.data_path} if args.data_path else {}))
    folder = make_folder(args.output)
    images = chosen_images(opened, args.images, args.count) if {"erf", "cam"} & set(args.show) else []
    figures = {}
    if "erf" in args.show:
        figures["erf"] = draw_fields(fields_of(opened, args.vs, images))
    if "cam" in args.show:
        figures["cam"] = draw_cams(opened, batches(opened, images), len(images))
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
