"""Predictions on a labelled data set: collected while it is evaluated, stored, and the statistics over them."""

import csv
import os
import zipfile
from dataclasses import asdict, dataclass
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
from scipy.stats import binomtest
from torch import Tensor

from data import ImageDataset

LEVEL = 0.95  # of all intervals
BINS = 15  # of confidence, for calibration
RESAMPLES = 10_000


@dataclass(frozen=True)
class Predictions:
    """What a model says about N labelled images.

    Attributes:
        paths: names of the images (N,), relative to the data set's folder.
        labels: int64 (N,), positions in ``classes``.
        classes: class names (C,).
        top: int64 (N, min(5, C)), classes with the highest scores, the best first.
        top_probability: float32, their probabilities.
        label_probability: float32 (N,), probability of the label.
    """

    paths: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    top: np.ndarray
    top_probability: np.ndarray
    label_probability: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether the best class is the label (N,)."""
        return self.top[:, 0] == self.labels

    def npz(self) -> bytes:
        """Return the content of ``predictions.npz``."""
        buffer = BytesIO()
        np.savez_compressed(buffer, **asdict(self))
        return buffer.getvalue()

    def csv(self) -> bytes:
        """Return the content of ``predictions.csv``: one row per image."""
        text, ranks = StringIO(), range(1, self.top.shape[1] + 1)
        writer = csv.writer(text)
        writer.writerow(("path", "label", "label_probability", *(f"{w}{r}" for r in ranks for w in ("top", "p"))))
        for i, path in enumerate(self.paths):
            best = zip(self.classes[self.top[i]], self.top_probability[i].tolist(), strict=True)
            row = (path, self.classes[self.labels[i]], float(self.label_probability[i]))
            writer.writerow((*row, *(cell for pair in best for cell in pair)))
        return text.getvalue().encode("utf-8", "surrogateescape")


class Collector:
    """Collects the predictions of an evaluation; ``add`` is its ``observe``."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, scores: Tensor, targets: Tensor, indices: Tensor) -> None:
        """Note one batch: scores (B, C), targets (B,), sample indices (B,)."""
        shares = scores.softmax(dim=1)
        best = shares.topk(min(5, scores.shape[1]), dim=1)
        own = shares.gather(1, targets[:, None])[:, 0]
        self._parts.append(tuple(part.cpu().numpy() for part in (indices, targets, best.indices, best.values, own)))

    def predictions(self, dataset: ImageDataset, folder: str) -> Predictions:
        """Return the predictions in the order of the data set; paths are relative to ``folder``."""
        indices, labels, top, shares, own = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        order = np.argsort(indices)
        names = [dataset.sample_name(int(i)) for i in indices[order]]
        if folder:
            names = [
                os.path.relpath(name, folder) if os.path.isabs(name) or name.startswith(folder) else name
                for name in names
            ]
        return Predictions(
            np.array(names), labels[order], np.array(dataset.classes), top[order], shares[order], own[order]
        )


def read_predictions(path: Path) -> Predictions:
    """Read a ``predictions.npz``; nothing in it is executed.

    Raises:
        ValueError, OSError: it cannot be read, or is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Predictions(**{name: file[name] for name in Predictions.__dataclass_fields__})
        shapes = {part.shape[0] for part in (found.paths, found.labels, found.top, found.top_probability)}
        if len(shapes) != 1 or found.top.ndim != 2 or found.labels.max(initial=0) >= len(found.classes):
            raise ValueError("its arrays do not fit each other")
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a predictions.npz of tools/report.py: {error}") from error
    return found


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the Wilson score interval of a share ``hits / count`` at ``LEVEL``, in 0..1."""
    interval = binomtest(hits, count).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Calibration:
    """Confidence (probability of the best class) against accuracy, in ``BINS`` bins of equal width.

    Attributes:
        confidence, accuracy: means of each bin that has images.
        count: images of each such bin.
        ece: expected calibration error: mean of |accuracy - confidence| over the images, in 0..1.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    ece: float


def calibration(predictions: Predictions) -> Calibration:
    """Return the calibration of the best class."""
    confidence = predictions.top_probability[:, 0].astype(np.float64)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    filled = count > 0
    mean_confidence = np.bincount(bins, confidence, BINS)[filled] / count[filled]
    accuracy = np.bincount(bins, predictions.correct, BINS)[filled] / count[filled]
    ece = float(np.sum(count[filled] * np.abs(accuracy - mean_confidence)) / len(bins))
    return Calibration(mean_confidence, accuracy, count[filled], ece)


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same images.

    Attributes:
        only_first, only_second: images that only this model has right.
        difference: accuracy of the second minus that of the first, in 0..1.
        interval: of the difference, by the paired percentile bootstrap.
        p_value: exact McNemar test, two-sided.
    """

    only_first: int
    only_second: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def paired_test(first: np.ndarray, second: np.ndarray, seed: int = 0) -> PairedTest:
    """Compare which images two models have right: boolean (N,) each.

    An image contributes -1, 0 or 1 to the difference, so drawing N images with replacement is drawing how many of each
    kind there are.
    """
    count = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    kinds = np.array([only_first, only_second, count - only_first - only_second]) / count
    drawn = np.random.default_rng(seed).multinomial(count, kinds, RESAMPLES)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile((drawn[:, 1] - drawn[:, 0]) / count, (tail, 100 - tail))
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return PairedTest(only_first, only_second, (only_second - only_first) / count, (float(low), float(high)), p_value)
