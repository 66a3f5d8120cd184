"""Measure what a network's features are worth without fine-tuning: k-NN and logistic regression on frozen features.

    python tools/probe.py CHECKPOINT --data-path DATA --shots 1 5 10

The network is the one whose configuration the checkpoint holds; for other files, name one with ``--cfg`` (with
MODEL.TYPE timm for models of timm). Its pooled features of all images are computed once and kept in ``--cache``.
docs/OWN_DATA.md defines the two classifiers, which follow the evaluation of DINOv3 (arXiv 2508.10104).
"""

import argparse
import hashlib
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from data import ImageLoader, build_batch_transform, build_val_loader, expanded_path
from inference import checkpoint_config, load_model
from models import inference_form
from tools.common import checkpoint_parser, make_folder, progress, run_tool
from utils.checkpoint import preprocessing, resolve_source, sha256
from utils.runtime import atomic_file, select_device

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
C_VALUES = np.logspace(-6, 5, 45)
HELD_OUT = 0.1  # of the training images, to choose C


def build_features(config: CfgNode, weights: str | None, device: torch.device) -> nn.Module:
    """Return the network of the configuration with the weights of MODEL.RESUME, without its classifier."""
    model = load_model(config, device, weights=weights).model
    model.reset_classifier(0)
    return inference_form(model)


@torch.inference_mode()
def extract(model: nn.Module, loader: ImageLoader, config: CfgNode, device: torch.device) -> np.ndarray:
    """Return the pooled features of all images, float32 (N, D)."""
    transform = build_batch_transform(config, is_train=False, device=device)
    found = [model(transform(*batch)[0]).float().cpu() for batch in progress(loader, desc="features", unit="batch")]
    features = torch.cat(found).numpy()
    if features.ndim != 2:
        raise ValueError(f"the features of {config.MODEL.NAME} have shape {features.shape}; it does not pool them")
    return features


def cache_file(folder: Path, config: CfgNode, weights: str | None, loader: ImageLoader) -> Path:
    """Return where the features of a loader's images are kept: the name is a hash of all that they depend on."""
    key = {
        "checkpoint": sha256(resolve_source(config.MODEL.RESUME)),
        "weights": [weights, config.MODEL.WEIGHTS_KEY, config.MODEL.STRIP_PREFIX],
        "model": [config.MODEL.TYPE, config.MODEL.TIMM_NAME, dict(config.MODEL.STRIP_MLP)],
        "preprocessing": [preprocessing(config), config.DATA.PIPELINE, config.DATA.FAST_RESIZE],
        "images": loader.dataset.source.fingerprint(),
    }
    return folder / f"features_{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.npy"


def all_features(
    config: CfgNode, folder: Path, weights: str | None, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Yield features, labels and class names, of the training and of the validation images."""
    model = None
    for of_train in (True, False):
        loader = build_val_loader(config, device=device, of_train=of_train)
        file = cache_file(folder, config, weights, loader)
        if not file.is_file():
            model = model or build_features(config, weights, device)
            with atomic_file(file) as temporary, open(temporary, "wb") as stream:
                np.save(stream, extract(model, loader, config, device))
        loader.close()
        yield np.load(file), loader.dataset.targets, loader.dataset.classes


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


def table(train: tuple, test: tuple, shots: Sequence[int], seeds: int) -> Iterator[str]:
    """Yield the lines of the table: each method on all images and on few, as mean and deviation over the seeds."""
    yield f"{'images per class':18}{'method':22}{'C':20}{'top-1 (%)':>14}{'balanced (%)':>16}"
    for count in (0, *shots):
        found, chosen = defaultdict(list), []
        for seed in range(seeds if count else 1):
            indices = draw(train[1], count, seed) if count else np.arange(len(train[1]))
            features, labels = train[0][indices], train[1][indices]
            predictions = knn(features, labels, test[0])
            value, predictions["logistic regression"] = logistic(features, labels, test[0], seed)
            chosen.append(value)
            for method, predicted in predictions.items():
                scores = accuracy_score(test[1], predicted), balanced_accuracy_score(test[1], predicted)
                found[method].append(100 * np.array(scores))
        for method, scores in found.items():
            spread = np.std(scores, axis=0, ddof=1) if len(scores) > 1 else None
            cells = [f"{mean:.2f}" for mean in np.mean(scores, axis=0)]
            if spread is not None:
                cells = [f"{cell} ± {deviation:.2f}" for cell, deviation in zip(cells, spread, strict=True)]
            values = " to ".join(f"{c:.2g}" for c in sorted({min(chosen), max(chosen)})) if "log" in method else ""
            yield f"{count or 'all':<18}{method:22}{values:20}{cells[0]:>14}{cells[1]:>16}"


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    overrides = {"DATA.DATA_PATH": args.data_path, **({"DATA.DATASET": args.dataset} if args.dataset else {})}
    config = checkpoint_config(args.checkpoint, args.cfg, opts=args.opts, overrides=overrides)
    device = torch.device(args.device) if args.device else select_device()
    train, test = all_features(config, make_folder(args.cache, "--cache"), args.weights, device)
    if train[2] != test[2]:
        raise ValueError(f"validation has classes that training lacks: {sorted(set(test[2]) - set(train[2]))[:5]}")
    if len(train[2]) < 2:
        raise ValueError(f"{args.data_path} has a single class, {train[2][0]!r}: there is nothing to tell apart")
    print(f"{args.checkpoint}: {train[0].shape[1]} features, {len(train[2])} classes; fitted on training images")
    print(f"(all: {len(train[0])}), measured on {len(test[0])} validation images")
    warnings.filterwarnings("ignore", message="The number of unique classes is greater")  # few images of each
    for line in table(train, test, args.shots, args.seeds):
        print(line, flush=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--dataset", metavar="NAME", help="name of the data set (default: the configuration's)")
    parser.add_argument("--shots", type=int, nargs="+", default=[], metavar="N", help="also fit to N images per class")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="draws of few images (default: %(default)s)")
    parser.add_argument(
        "--cache", type=expanded_path, default=Path("output/probe"), metavar="DIR", help="default: %(default)s"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(command))
