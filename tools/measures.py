"""Statistics over predictions: intervals, calibration, and the paired comparison of two models."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from tools.predictions import Predictions

LEVEL = 0.95  # of all intervals
BINS = 15  # of confidence, for calibration
RESAMPLES = 10_000


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


def paired_difference(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Return the accuracy of a second model minus that of a first, and its paired bootstrap interval, in 0..1.

    Each model is boolean (S, N): which of N images it has right, in S trainings with different seeds. Images are drawn
    with replacement; the trainings stay. Drawing N images is drawing how many have each mean difference.
    """
    gap = second.mean(axis=0) - first.mean(axis=0)
    values, counts = np.unique(gap, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(gap), counts / len(gap), RESAMPLES) @ values / len(gap)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return float(gap.mean()), (float(low), float(high))


def paired_test(first: np.ndarray, second: np.ndarray, seed: int = 0) -> PairedTest:
    """Compare which images two models have right: boolean (N,) each."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return PairedTest(only_first, only_second, *paired_difference(first[None], second[None], seed), p_value)
