"""Predict the classes of images.

    python tools/predict.py CHECKPOINT photo.jpg holiday/ "scans/*.png" --top 3
    python tools/predict.py CHECKPOINT holiday/ --csv found.csv --jsonl found.jsonl --sheet found.png

Images are preprocessed as in evaluation. A folder stands for all images below it. Exit status: 0; 1 if an image
could not be read (they are listed at the end); 2 if nothing was predicted. From Python: ``inference.load_predictor``.
"""

import argparse
import csv
import glob
import json
import os
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from data import list_images
from inference import Prediction, Predictor
from tools.common import (
    checkpoint_parser,
    keep_inputs,
    open_from,
    output_path,
    progress,
    run_tool,
    shortened,
    whole_number,
    write_bytes,
)
from tools.figures import grid, png_bytes, put_title, thumbnail
from utils.runtime import printable

SHEET_IMAGES = 60  # most of a contact sheet
SHEET_COLUMNS = 6
NAME_WIDTH = 28  # characters of a class name in the table and the sheet


def find_images(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the images that files, folders and patterns name, each once, and what cannot be read, with the reason.

    Raises:
        ValueError: a word names nothing.
    """
    images: dict[str, None] = {}
    unusable: dict[str, str] = {}
    for word in words:
        matches = [word] if os.path.lexists(word) else sorted(glob.glob(os.path.expanduser(word), recursive=True))
        if not matches:
            raise ValueError(f"{word} is not a file, a folder, or a pattern that matches one")
        for path in matches:
            if os.path.isdir(path):
                listing = list_images(path)
                images.update(dict.fromkeys(os.path.join(path, name) for name in listing.images))
                unusable.update({os.path.join(path, name): why for name, why in listing.unusable.items()})
            else:
                images[path] = None
    if not images and not unusable:
        raise ValueError(f"no images in {', '.join(words)}")
    return list(images), unusable


def print_table(predictions: Sequence[Prediction]) -> None:
    """Print one line per image: path, then percentages with names, in columns."""
    rows = []
    for p in predictions:
        best = zip(p.names, p.probabilities, strict=True)
        rows.append((printable(p.source), *(f"{100 * share:5.1f} % {shortened(n, NAME_WIDTH)}" for n, share in best)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def csv_text(predictions: Sequence[Prediction]) -> str:
    """Return CSV with one row per image and class: path, rank, class, index, probability."""
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(("path", "rank", "class", "index", "probability"))
    for p in predictions:
        for rank, row in enumerate(zip(p.names, p.indices, p.probabilities, strict=True), start=1):
            writer.writerow((p.source, rank, *row))
    return text.getvalue()


def jsonl_text(predictions: Sequence[Prediction]) -> str:
    """Return one JSON object per image: path and classes, or path and error."""

    def row(p: Prediction) -> dict:
        if p.error:
            return {"path": p.source, "error": p.error}
        keys = ("class", "index", "probability")
        best = [dict(zip(keys, one, strict=True)) for one in zip(p.names, p.indices, p.probabilities, strict=True)]
        return {"path": p.source, "classes": best}

    return "".join(json.dumps(row(p)) + "\n" for p in predictions)


def contact_sheet(predictions: Sequence[Prediction]) -> bytes:
    """Return a PNG with the first ``SHEET_IMAGES`` images and their best classes."""
    shown = predictions[:SHEET_IMAGES]
    columns = min(SHEET_COLUMNS, len(shown))
    figure, places = grid(-(-len(shown) // columns), columns, lines=4)
    for axes, p in zip(places, shown, strict=False):
        axes.set_anchor("N")  # titles of a row at one height
        axes.imshow(thumbnail(p.source, 220))
        best = zip(p.names[:3], p.probabilities[:3], strict=True)
        lines = (f"{shortened(name, NAME_WIDTH)}: {100 * share:.1f} %" for name, share in best)
        put_title(axes, "\n".join((shortened(os.path.basename(p.source), NAME_WIDTH), *lines)))
    return png_bytes(figure)


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    images, unusable = find_images(args.images)
    keep_inputs([args.checkpoint, *images], [args.csv, args.jsonl, args.sheet])
    predictor = Predictor(open_from(args), top_k=args.top, batch_size=args.batch_size)
    found = list(progress(predictor.stream(images), total=len(images), desc="predicting"))
    failed = [Prediction(path, error=why) for path, why in unusable.items()] + [p for p in found if p.error]
    good = [p for p in found if not p.error]
    if good:
        print_table(good)
    for path, text in ((args.csv, csv_text(good)), (args.jsonl, jsonl_text([*good, *failed]))):
        if path:
            write_bytes(path, text.encode("utf-8", "surrogateescape"))
    if args.sheet and good:
        write_bytes(args.sheet, contact_sheet(good))
        if len(good) > SHEET_IMAGES:
            print(f"{args.sheet} shows the first {SHEET_IMAGES} of {len(good)} images")
    for p in failed:
        print(f"unreadable: {printable(p.source)}: {printable(p.error)}", file=sys.stderr)
    return (1 if good else 2) if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = checkpoint_parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER|PATTERN", help="images to predict")
    parser.add_argument("--top", type=whole_number(1, 100), default=5, metavar="K", help="classes per image (5)")
    parser.add_argument(
        "--batch-size", type=whole_number(1, 100_000), default=64, metavar="N", help="images at once (64)"
    )
    parser.add_argument("--csv", type=output_path, metavar="FILE", help="one row per image and class")
    parser.add_argument("--jsonl", type=output_path, metavar="FILE", help="one JSON object per image")
    parser.add_argument("--sheet", type=output_path, metavar="FILE", help="contact sheet (PNG)")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(command))
