"""Compare finished runs.

    python tools/compare.py output/tiny/a output/tiny/b [more] --curves curves.png --csv disagreements.csv

A run is its output folder. The differences of the configurations and the curves are shown. Where tools/report.py has
written predictions.npz (in the folder, or in its folder ``report``), the accuracy follows with its interval and,
against the first run on the same images, the difference with a paired bootstrap interval, McNemar's exact test,
and where the two disagree. Predictions of different image lists are refused.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

import numpy as np

from data import expanded_path
from tools.common import keep_inputs, output_path, run_tool, write_bytes
from tools.figures import png_bytes
from tools.measures import paired_test, wilson_interval
from tools.predictions import require_same_images
from tools.runs import FinishedRun, read_run, short_names
from utils.config import config_differences
from utils.runtime import printable
from utils.training import curves_figure

SHOWN = 10  # images on which two runs disagree


def print_configs(runs: Sequence[FinishedRun]) -> None:
    """Print the keys in which the runs differ, places left out."""
    found: dict[str, list[Any]] = {}
    for run in runs[1:]:
        for key in config_differences(runs[0].config, run.config):
            found.setdefault(key, [])
    print(f"configuration ({' | '.join(run.name for run in runs)}):{'' if found else ' no differences'}")
    for key in found:
        values = [run.config for run in runs]
        for part in key.split("."):
            values = [value[part] for value in values]
        print(f"  {key}: {' | '.join(printable(str(value)) for value in values)}")


def print_accuracies(runs: Sequence[FinishedRun]) -> None:
    """Print last and best accuracy of the training, and the accuracy of the report with its interval."""
    head = "top-1 (%)"
    width = max(len(head) - 2, *(len(run.name) for run in runs))
    print(f"\n{head:<{width + 2}} {'last':>6} {'best*':>6}  report, with its 95 % Wilson interval")
    for run in runs:
        accuracies = [row["val_acc1"] for row in run.rows if row.get("val_acc1") is not None]
        trained = f"{accuracies[-1]:6.2f} {max(accuracies):6.2f}" if accuracies else f"{'-':>6} {'-':>6}"
        report = "- (tools/report.py makes it)"
        if run.predictions is not None:
            hits, count = int(run.predictions.correct.sum()), len(run.predictions.labels)
            low, high = wilson_interval(hits, count)
            report = f"{100 * hits / count:.2f} ({100 * low:.2f} to {100 * high:.2f}) of {count} images"
        print(f"  {run.name:<{width}} {trained}  {report}")
    print("* The best epoch was chosen on the set that it is reported on.")


def print_paired(first: FinishedRun, other: FinishedRun) -> None:
    """Print the paired comparison of two runs, and the images that one has right with the highest confidence."""
    a, b = first.predictions, other.predictions
    test = paired_test(a.correct, b.correct)
    low, high = (100 * end for end in test.interval)
    print(f"\n{other.name} against {first.name}, on the same {len(a.labels)} images:")
    print(f"  difference {100 * test.difference:+.2f} points (95 % paired bootstrap {low:+.2f} to {high:+.2f})")
    print(
        f"  right only in {other.name} {test.only_second}, only in {first.name} {test.only_first}; "
        f"McNemar p = {test.p_value:.3g}"
    )
    gap = b.label_probability - a.label_probability
    differing = np.flatnonzero(a.correct != b.correct)
    others = int((a.top[:, 0] != b.top[:, 0]).sum())
    print(f"  another best class for {others} images{'; the clearest:' if len(differing) else ''}")
    for i in differing[np.argsort(-np.abs(gap[differing]), kind="stable")][:SHOWN]:
        one, two = a.classes[a.top[i, 0]], b.classes[b.top[i, 0]]
        print(printable(f"    {a.paths[i]}: label {a.classes[a.labels[i]]}; {first.name}: {one}, {other.name}: {two}"))


def disagreements_csv(runs: Sequence[FinishedRun]) -> bytes:
    """Return CSV of the images for which not all runs have the same best class."""
    first = runs[0].predictions
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(("path", "label", *(run.name for run in runs)))
    best = np.stack([run.predictions.top[:, 0] for run in runs], axis=1)
    for i in np.flatnonzero((best != best[:, :1]).any(axis=1)):
        writer.writerow((first.paths[i], first.classes[first.labels[i]], *first.classes[best[i]]))
    return text.getvalue().encode("utf-8", "surrogateescape")


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    if len(args.runs) < 2:
        raise ValueError("name at least two runs")
    read = ("config.yaml", "metrics.jsonl", "predictions.npz", "report/predictions.npz")
    keep_inputs([run / name for run in args.runs for name in read], [args.curves, args.csv])
    runs = [read_run(*pair) for pair in zip(args.runs, short_names(args.runs), strict=True)]
    predicted = [run for run in runs if run.predictions is not None]
    for run in predicted[1:]:
        require_same_images(predicted[0].name, predicted[0].predictions, run.name, run.predictions)
    if args.csv and len(predicted) < 2:
        raise ValueError("--csv needs the predictions of at least two runs: tools/report.py makes them")
    print_configs(runs)
    print_accuracies(runs)
    for run in predicted[1:]:
        print_paired(predicted[0], run)
    write_bytes(args.curves, png_bytes(curves_figure({run.name: run.rows for run in runs})))
    print(f"\ncurves: {args.curves}")
    if args.csv:
        write_bytes(args.csv, disagreements_csv(predicted))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=expanded_path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--curves", type=output_path, default="compare.png", metavar="FILE", help="PNG (compare.png)")
    parser.add_argument("--csv", type=output_path, metavar="FILE", help="images on which the runs disagree")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(command))
