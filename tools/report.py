"""Evaluate a checkpoint and write a page about what it gets right and wrong.

    python tools/report.py CHECKPOINT --data-path <folder>

Writes report.html, one file without links to the network, predictions.npz (which tools/compare.py reads) and
predictions.csv: path, label, five best classes with probabilities. They go to the folder ``report`` beside the
checkpoint, or to ``--output``.
"""

import base64
import hashlib
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from sklearn.metrics import confusion_matrix

from data import ImageDataset, build_val_loader, expanded_path
from inference import Opened, evaluate_opened
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
from tools.measures import BINS, calibration, wilson_interval
from tools.predictions import Collector, Predictions
from tools.report_parts import (
    class_rows,
    confused_pairs,
    confusion_figure,
    data_uri,
    facts_of,
    reliability_figure,
    worst_mistakes,
)
from utils.config import dump_config, recipe_deviations
from utils.runtime import printable
from utils.training import EvalResult, curves_figure, metrics_rows


def run_curves(folder: Path) -> tuple[str, str]:
    """Return the curves of the run in a folder as an address, and why there are none."""
    try:
        rows = metrics_rows(folder / "metrics.jsonl")
    except (OSError, ValueError) as error:
        return "", printable(f"No curves: metrics.jsonl beside the checkpoint cannot be read ({error}).")
    return data_uri(png_bytes(curves_figure({"": rows}))), ""


def page(opened: Opened, result: EvalResult, predictions: Predictions, dataset: ImageDataset) -> str:
    """Return the report as HTML; every text in it is escaped by the template."""
    classes = predictions.classes.tolist()
    matrix = confusion_matrix(predictions.labels, predictions.top[:, 0], labels=np.arange(len(classes)))
    script = (Path(__file__).parent / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = calibration(predictions)
    curves, no_curves = run_curves(opened.path.parent)
    data = Path(opened.config.DATA.DATA_PATH).name or opened.config.DATA.DATASET
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return templates.get_template("report.html").render(
        title=printable(f"{opened.model_name} on {data}"),
        result=result,
        interval=wilson_interval(int(predictions.correct.sum()), len(predictions.labels)),
        top5=len(classes) > 5,
        facts=facts_of(opened),
        classes=class_rows(predictions),
        confusion=data_uri(confusion_figure(matrix, classes)),
        pairs=confused_pairs(matrix, classes),
        reliability=data_uri(reliability_figure(found)),
        ece=found.ece,
        bins=BINS,
        mistakes=worst_mistakes(predictions, dataset),
        curves=curves,
        no_curves=no_curves,
        deviations={k: tuple(printable(str(v)) for v in pair) for k, pair in recipe_deviations(opened.config).items()},
        config=printable(dump_config(opened.config), keep_lines=True),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    given = {"DATA__DATA_PATH": args.data_path, "TEST__BATCH_SIZE": args.batch_size}
    opened = open_from(args, **{key: value for key, value in given.items() if value is not None})
    folder = make_folder(args.output or opened.path.parent / "report")
    collector = Collector()
    with closing(build_val_loader(opened.config, device=opened.device)) as loader:
        dataset = loader.dataset
        with progress(total=len(dataset), desc="evaluating") as bar:
            result = evaluate_opened(
                opened, loader, observe=lambda *batch: (collector.add(*batch), bar.update(len(batch[1])))
            )
    predictions = collector.predictions(dataset, opened.config.DATA.DATA_PATH)
    html = page(opened, result, predictions, dataset)
    write_bytes(folder / "predictions.npz", predictions.npz())
    write_bytes(folder / "predictions.csv", predictions.csv())
    write_bytes(folder / "report.html", html.encode("utf-8", "replace"))
    low, high = wilson_interval(int(predictions.correct.sum()), len(predictions.labels))
    print(
        f"top-1 {result.acc1:.2f} % (95 % interval {100 * low:.2f} - {100 * high:.2f}) of {result.num_samples} images"
    )
    print(f"written to {folder}: report.html, predictions.npz, predictions.csv")
    return 0


def build_parser() -> Any:
    """Return the command line's parser."""
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--data-path", metavar="DIR", help="data set with val/, as in evaluation")
    parser.add_argument("--batch-size", type=whole_number(1, 100_000), metavar="N", help="images per forward pass")
    parser.add_argument("--output", type=expanded_path, metavar="DIR", help="folder of the report")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(command))
