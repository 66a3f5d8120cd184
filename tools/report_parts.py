"""The parts of a report: facts, tables, figures, mistakes."""

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from data import ImageDataset
from inference import Opened
from tools.common import shortened
from tools.figures import new_figure, png_bytes
from tools.measures import BINS, Calibration
from tools.predictions import Predictions
from utils.runtime import printable
from utils.training import shown_channels

LABELLED = 30  # classes up to which the confusion matrix has names
PAIRS = 24
MISTAKES = 24
THUMBNAIL = 320  # pixels: sharp where the screen doubles them


def class_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """Return name, number of images, and (precision, recall, F1) of each class, None where not defined."""
    numbers = np.arange(len(predictions.classes))
    figures = precision_recall_fscore_support(
        predictions.labels, predictions.top[:, 0], labels=numbers, zero_division=np.nan
    )
    shares = [[None if np.isnan(v) else float(v) for v in row] for row in np.stack(figures[:3], axis=1)]
    names = map(printable, predictions.classes.tolist())
    rows = zip(names, figures[3].astype(int).tolist(), shares, strict=True)
    return [{"name": name, "images": images, "shares": row} for name, images, row in rows]


def confused_pairs(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the ``PAIRS`` (label, prediction) that most images fall under, without the diagonal."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    cells = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
    return [
        {
            "label": printable(str(classes[i])),
            "predicted": printable(str(classes[j])),
            "images": int(wrong[i, j]),
            "share": 100 * wrong[i, j] / matrix[i].sum(),
        }
        for i, j in cells
    ]


def confusion_figure(matrix: np.ndarray, classes: Sequence[str]) -> bytes:
    """Return the confusion matrix, as shares of each label, as PNG; with names and numbers where they fit."""
    count = len(classes)
    few = count <= LABELLED
    side = max(4.0, min(9.0, 2 + 0.4 * count))
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    norm = None if few else LogNorm(1e-3, 1, clip=True)  # a single image of a thousand classes stays visible
    image = axes.imshow(shares, cmap="Blues", norm=norm, vmin=0 if few else None, vmax=1 if few else None)
    figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)), label="share of the label's images")
    number = "" if few else " (class number, from 0)"
    axes.set(xlabel=f"predicted{number}", ylabel=f"label{number}")
    if few:
        names = [shortened(str(name), 20) for name in classes]
        axes.set_xticks(range(count), names, rotation=90, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
        for i, j in zip(*matrix.nonzero(), strict=True):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color=color, fontsize=7)
    return png_bytes(figure)


def reliability_figure(found: Calibration) -> bytes:
    """Return the reliability diagram, with the number of images of each bin below it, as PNG."""
    figure = new_figure(5.5, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color="grey", linestyle="--", label="perfectly calibrated")
    upper.plot(found.confidence, found.accuracy, marker="o", label="this model")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    upper.legend(frameon=False, loc="best")
    lower.bar(found.confidence, found.count, width=0.4 / BINS)
    lower.set(xlabel="confidence: probability of the best class", ylabel="images")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return png_bytes(figure)


def worst_mistakes(predictions: Predictions, dataset: ImageDataset) -> list[dict[str, Any]]:
    """Return the wrong predictions whose label has the lowest probability, with thumbnails."""
    wrong = np.flatnonzero(~predictions.correct)
    order = wrong[np.argsort(predictions.label_probability[wrong], kind="stable")][:MISTAKES]
    names = [printable(name) for name in predictions.classes.tolist()]
    return [
        {
            "path": printable(str(predictions.paths[i])),
            "label": names[predictions.labels[i]],
            "label_share": float(predictions.label_probability[i]),
            "predicted": names[predictions.top[i, 0]],
            "share": float(predictions.top_probability[i, 0]),
            "image": picture_uri(dataset, int(i)),
        }
        for i in order
    ]


def picture_uri(dataset: ImageDataset, index: int) -> str:
    """Return an image of the data set as a small picture inside the page."""
    picture = dataset.source.load(index)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(shown_channels(np.asarray(picture)))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def preprocessing_words(steps: dict[str, Any]) -> str:
    """Return ``Opened.preprocessing`` in words."""
    size, interpolation = steps["img_size"], steps["interpolation"]
    scaled = f"short side {steps['short_side']}, centre crop {size}" if steps["crop"] else f"scaled to {size}"
    return f"{scaled} pixels, {interpolation}; mean {steps['mean']}, standard deviation {steps['std']}"


def facts_of(opened: Opened) -> list[tuple[str, str]]:
    """Return what the page says about the checkpoint, as (name, value)."""
    config, done = opened.config, opened.metadata.get("progress")
    facts = [
        ("checkpoint", str(opened.path)),
        ("model", opened.model_name),
        ("parameters", f"{sum(p.numel() for p in opened.model.parameters()):,}"),
        ("data set", ": ".join(filter(None, (config.DATA.DATASET, config.DATA.DATA_PATH)))),
        ("preprocessing", preprocessing_words(opened.preprocessing)),
    ]
    if isinstance(done, dict):
        facts.append(("trained", f"to epoch {done['epoch']}, update {done['global_step']}"))
    return [(name, printable(value)) for name, value in facts]


def data_uri(png: bytes) -> str:
    """Return a PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
