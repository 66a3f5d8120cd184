"""The two classifiers of tools/probe.py, as docs/OWN_DATA.md defines them, and few images drawn to fit them to."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from tools.common import progress

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
C_VALUES = np.logspace(-6, 5, 45)
HELD_OUT = 0.1  # of the training images, to choose C


def knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """Return the predictions of weighted k-NN by cosine similarity, for each k."""
    gallery, targets = F.normalize(torch.from_numpy(train)), torch.from_numpy(labels)
    ks = sorted({min(k, len(train)) for k in NEIGHBOURS})
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for queries in F.normalize(torch.from_numpy(test)).split(1024):
        nearest = (queries @ gallery.T).topk(ks[-1])
        weights = (nearest.values / TEMPERATURE).softmax(dim=1)
        for k in ks:
            counted = torch.zeros(len(queries), int(targets.max()) + 1)
            counted.scatter_add_(1, targets[nearest.indices[:, :k]], weights[:, :k])
            votes[k].append(counted.argmax(dim=1))
    return {f"k-NN, k {k}": torch.cat(parts).numpy() for k, parts in votes.items()}


def logistic(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """Return the C that was chosen on held-out training images, and the predictions of a fit to all of them."""
    groups = [np.random.RandomState(seed).permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    out = np.concatenate([group[: max(1, round(HELD_OUT * len(group)))] for group in groups if len(group) > 1] or [[]])
    chosen = 1.0
    if len(out):
        kept = np.setdiff1d(np.arange(len(labels)), out)
        fit = LogisticRegression(max_iter=1000, warm_start=True)
        scores = []
        for value in progress(C_VALUES, desc="choosing C", unit="value"):
            fit.set_params(C=value).fit(train[kept], labels[kept])
            scores.append(fit.score(train[out], labels[out]))
        chosen = float(C_VALUES[int(np.argmax(scores))])  # the smallest of those that are best
    return chosen, LogisticRegression(C=chosen, max_iter=1000).fit(train, labels).predict(test)


def draw(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Return the indices of ``shots`` images of each class, drawn at random.

    Raises:
        ValueError: a class has fewer.
    """
    random, smallest = np.random.RandomState(seed), int(np.unique(labels, return_counts=True)[1].min())
    if shots > smallest:
        raise ValueError(f"--shots {shots}: the smallest class has {smallest} training images")
    return np.concatenate([random.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)])
