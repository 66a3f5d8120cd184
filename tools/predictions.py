"""Predictions on a labelled data set: collected while it is evaluated, stored, and read back."""

import csv
import os
import zipfile
from dataclasses import asdict, dataclass
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
from torch import Tensor

from data import ImageDataset
from utils.runtime import printable


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

    def npz(self, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
        """Return the content of ``predictions.npz``; ``zipfile.ZIP_LZMA`` makes it half as large, more slowly."""
        buffer = BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name, values in asdict(self).items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, values, allow_pickle=False)
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


def require_same_images(first: str, a: Predictions, other: str, b: Predictions) -> None:
    """Check that the predictions ``a`` of the run ``first`` and ``b`` of ``other`` are of the same labelled images.

    Raises:
        ValueError: they are not; names the first difference.
    """
    if not np.array_equal(a.classes, b.classes):
        raise ValueError(f"{first} and {other} were not evaluated on the same classes; make both reports anew")
    pairs = zip(a.paths, a.labels, b.paths, b.labels, strict=False)
    different = next((printable(f"{p} / {q}") for p, i, q, j in pairs if (p, i) != (q, j)), None)
    if different or len(a.paths) != len(b.paths):
        why = f"first difference: {different}" if different else f"{len(a.paths)} and {len(b.paths)} images"
        raise ValueError(
            f"{first} and {other} were not evaluated on the same images ({why}); make both reports with the "
            "same --data-path"
        )
