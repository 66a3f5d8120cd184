"""Draw the batch that the network sees: after augmentation, erasing and mixing, with class names and shares.

    python tools/show_batch.py configs/<leaf>.yaml --data-path <folder> --output batch.png
    python tools/show_batch.py checkpoint_best.pth --data-path <folder> --epoch 20

It is the first training batch of an epoch, as one process with the configuration's seed gets it: for epoch 1 the
``batch.png`` that a run of one process writes at its start.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a file, Python looks in tools/ only

from PIL import Image
from yacs.config import CfgNode

from data import build_batch_transform, build_train_loader, check_transform
from tools.common import keep_inputs, output_path, run_tool, write_bytes
from utils.checkpoint import stored_config
from utils.config import load_config, load_stored_config, normalisation
from utils.training import draw_batch


def first_batch(config: CfgNode, epoch: int) -> Image.Image:
    """Return the picture of the first training batch of ``epoch``, counted from 1."""
    check_transform(config)
    with closing(build_train_loader(config, device="cpu")) as loader:
        classes = loader.dataset.classes
        count = config.MODEL.NUM_CLASSES or len(classes)
        if len(classes) > count:
            raise ValueError(f"the data have {len(classes)} classes, MODEL.NUM_CLASSES is {count}")
        if loader.sampler.batches_per_epoch == 0:
            count, batch = len(loader.dataset), config.DATA.BATCH_SIZE
            raise ValueError(f"{count} image(s) do not fill a batch of {batch}; set DATA.BATCH_SIZE with --opts")
        accumulation = max(1, config.TRAIN.ACCUMULATION_STEPS)
        updates = -(-loader.sampler.batches_per_epoch // accumulation)
        loader.sampler.set_progress(epoch - 1)
        images, targets, indices = next(iter(loader))
        transform = build_batch_transform(config, is_train=True, device="cpu", num_classes=count)
        update = (epoch - 1) * updates * accumulation
        images, targets = transform(images, targets, indices, epoch=epoch - 1, update=update)
        mean, std = normalisation(config)
        return draw_batch(images, targets, classes, smoothing=config.MODEL.LABEL_SMOOTHING, mean=mean, std=std)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="CONFIG|CHECKPOINT", help="config file (.yaml), or a checkpoint of a run")
    parser.add_argument("--data-path", help="data set [DATA.DATA_PATH]")
    parser.add_argument(
        "--output", type=output_path, default="batch.png", metavar="FILE", help="picture (default: %(default)s)"
    )
    parser.add_argument("--epoch", type=int, default=1, metavar="N", help="from 1 (default: %(default)s)")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="set keys of docs/CONFIG.md")
    return parser


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.epoch < 1:
        parser.error(f"--epoch is {args.epoch}; the first is 1")
    keep_inputs([args.source], [args.output])
    overrides = {"DATA.NUM_WORKERS": 0, **({"DATA.DATA_PATH": args.data_path} if args.data_path else {})}
    if args.source.endswith((".yaml", ".yml")):
        config = load_config(args.source, args.opts, overrides)
    else:
        overrides |= {"MODEL.RESUME": args.source, "TRAIN.DISTILL.KIND": "none"}  # the picture needs no teacher
        config = load_stored_config(stored_config(args.source), args.source, args.opts, overrides)[0]
    picture = first_batch(config, args.epoch)
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    write_bytes(args.output, buffer.getvalue())
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(command))
