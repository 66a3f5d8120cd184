"""What a run reports: log lines, one JSON object per epoch in ``metrics.jsonl``, curves."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.runtime import atomic_file, set_aside, side_file, write_text_atomic
from utils.training.evaluation import EvalResult
from utils.training.meters import RunningMeans, UpdateTimer, peak_memory_mib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

DATA_WAIT_SHARE = 0.1  # of an epoch's time
DATA_WAIT_SECONDS = 2.0  # per epoch
_FIGURES = ("epoch", "train_loss", "val_loss", "val_acc1", "val_acc5", "lr")  # what is drawn


def log_updates(
    position: str, means: RunningMeans, timer: UpdateTimer, *, lr: float, left: int, device: torch.device
) -> dict[str, float]:
    """Log one line about the updates since the last such line; return its figures.

    Args:
        position: place in the run.
        means, timer: of the epoch; their laps are taken.
        lr: learning rate of the newest update.
        left: updates until the end of the run, for the estimated time.
        device: whose memory is logged.
    """
    loss, grad_norm = means.lap()  # waits for the device, so that the times below are true
    pace, memory = timer.lap(), peak_memory_mib(device)
    remaining = timedelta(seconds=round(left * pace.seconds / max(pace.updates, 1)))
    logger.info(
        "%s loss %.4f lr %.3e grad_norm %.3f %.1f images/s data_wait %.0f %% memory %.0f MiB eta %s",
        position,
        loss,
        lr,
        grad_norm,
        pace.images_per_second,
        100 * pace.wait_share,
        memory,
        remaining,
    )
    return {
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "images_per_second": pace.images_per_second,
        "data_wait": pace.wait_share,
        "memory_mib": memory,
    }


def epoch_row(means: RunningMeans, timer: UpdateTimer, *, device: torch.device) -> dict[str, float]:
    """Return an epoch's training figures for ``metrics.jsonl``, and warn if it waited for data. Collective.

    Loss and gradient norm are means over all processes.
    """
    loss, grad_norm = means.reduced()
    pace = timer.total()
    warn_of_data_wait(pace.wait_share, pace.seconds)
    return {
        "train_loss": loss,
        "grad_norm": grad_norm,
        "images_per_second": pace.images_per_second,
        "data_wait": pace.wait_share,
        "memory_mib": peak_memory_mib(device),
        "seconds": pace.seconds,
    }


def warn_of_data_wait(share: float, seconds: float) -> None:
    """Warn if training waited for data for more than a tenth of an epoch.

    Args:
        share: fraction of the epoch in which the device waited.
        seconds: length of the epoch; less than two seconds of waiting are not reported.
    """
    if share < DATA_WAIT_SHARE or share * seconds < DATA_WAIT_SECONDS:
        return
    logger.warning(
        "training waited for data %.0f %% of the epoch (%.0f s). In this order: one worker per core "
        "(DATA.NUM_WORKERS -1), the fast pipeline (DATA.PIPELINE fast), decoded images in memory if they fit "
        "(DATA.CACHE_DECODED ram), resizing with other rounding (DATA.FAST_RESIZE True), a faster disk, more cores; "
        "see docs/PERFORMANCE.md",
        100 * share,
        share * seconds,
    )


def record_epoch(directory: Path, row: dict[str, Any], result: EvalResult | None) -> dict[str, Any]:
    """Append an epoch to ``metrics.jsonl``, redraw ``curves.png``, log it, and return what was appended.

    Trouble with these files only warns.

    Args:
        directory: output folder.
        row: the epoch's number (from 1), training figures and best accuracy.
        result: of the evaluation, or None if the epoch was not evaluated.
    """
    if result is not None:
        row = {
            **row,
            "val_loss": result.loss,
            "val_acc1": result.acc1,
            "val_acc5": result.acc5,
            "val_balanced_acc1": result.balanced_acc1,
            "val_samples": result.num_samples,
        }
        logger.info(
            "epoch %d: train loss %.4f, validation loss %.4f, top-1 %.2f %%, top-5 %.2f %%, balanced accuracy %.2f %% "
            "of %d samples; best top-1 %.2f %%",
            row["epoch"],
            row["train_loss"],
            result.loss,
            result.acc1,
            result.acc5,
            result.balanced_acc1,
            result.num_samples,
            row["best_acc1"],
        )
    metrics, curves = directory / "metrics.jsonl", directory / "curves.png"
    rows = read_metrics(metrics)
    with side_file(metrics):
        append_metrics(metrics, row)
    with side_file(curves):
        plot_curves([*rows, row], curves)
    return row


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object as a line; NaN becomes null, which strict readers need.

    Raises:
        OSError: the line could not be written; names ``path``.
    """
    clean = {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl``; an unfinished last line, left by a killed process, is ignored.

    A file that holds anything else is set aside, and there are no rows.
    """
    if not path.exists():
        return []
    try:
        return metrics_rows(path)
    except (OSError, ValueError) as error:
        with side_file(path):
            set_aside(path, error)
        return []


def metrics_rows(path: Path) -> list[dict[str, Any]]:
    """Return what ``read_metrics`` returns, but leave the file alone whatever it holds.

    Raises:
        OSError, ValueError: the file cannot be read, or a line is not the figures of an epoch.
    """
    *lines, last = path.read_text(encoding="utf-8").splitlines() or [""]
    try:
        rows = [json.loads(line) for line in lines]
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(last))
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not all(_is_row(row) for row in rows):
        raise ValueError("a line is not the figures of an epoch")
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("epoch")) is not int:
        return False
    return all(type(row.get(key, 0)) in (int, float, type(None)) for key in _FIGURES)


def trim_metrics(path: Path, epochs: int) -> None:
    """Keep the rows of the first ``epochs`` epochs only, so that a resumed run does not report an epoch twice."""
    rows = [row for row in read_metrics(path) if row["epoch"] <= epochs]
    if path.exists():
        with side_file(path):
            write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs of ``rows`` into a PNG."""
    figure = curves_figure({"": rows})
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def curves_figure(runs: Mapping[str, list[dict[str, Any]]]) -> "Figure":
    """Return a figure of loss, accuracy and learning rate over the epochs.

    Args:
        runs: rows of ``metrics.jsonl`` by the name of the run, each run in a colour of its own; a single run has the
            name "", and each line a colour of its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 3.6 + 0.25 * (len(runs) // 4)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("loss (nats)", {"training objective": "train_loss", "validation cross-entropy": "val_loss"}),
        ("validation accuracy (%)", {"top-1": "val_acc1", "top-5": "val_acc5"}),
        ("learning rate", {"": "lr"}),
    )
    named = "" not in runs
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, rows in enumerate(runs.values()):
            for style, (what, key) in zip(("-", "--"), lines.items(), strict=False):
                points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
                own = {"color": f"C{number % 10}", "linestyle": style} if named else {}
                if points:
                    marker = "." if len(points) < 40 else None
                    axes.plot(*zip(*points, strict=True), label=what, marker=marker, **own)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # one epoch is one tick
        axes.grid(alpha=0.3)
        if len(lines) > 1 and axes.lines:
            grey = [Line2D([], [], color="grey", linestyle=style) for style in ("-", "--")]
            axes.legend(*((grey, [*lines]) if named else ()), frameon=False)
    if named:
        colours = [Line2D([], [], color=f"C{number % 10}") for number in range(len(runs))]
        legend = figure.legend(colours, [*runs], loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure
