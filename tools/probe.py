"""Measure what a network's features are worth without fine-tuning: k-NN and logistic regression on frozen features.

    python tools/probe.py CHECKPOINT --data-path DATA --shots 1 5 10

The network is the one whose configuration the checkpoint holds; for other files, name one with ``--cfg`` (with
MODEL.TYPE timm for models of timm). Its pooled features of all images are computed once and kept in ``--cache``.
docs/OWN_DATA.md defines the two classifiers, which follow the evaluation of DINOv3 (arXiv 2508.10104).
"""

import argparse
import hashlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch import nn
from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from data import ImageLoader, build_batch_transform, build_val_loader, expanded_path
from inference import checkpoint_config, load_model
from models import inference_form
from tools.classifiers import draw, knn, logistic
from tools.common import checkpoint_parser, make_folder, progress, run_tool, whole_number
from utils.checkpoint import preprocessing, resolve_source, sha256
from utils.runtime import atomic_file, select_device


class Features(NamedTuple):
    """Features float32 (N, D) and labels int64 (N,) of images, and the names of the classes."""

    values: np.ndarray
    labels: np.ndarray
    classes: list[str]


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


def all_features(config: CfgNode, folder: Path, weights: str | None, device: torch.device) -> Iterator[Features]:
    """Yield the features of the training and of the validation images."""
    model = None
    for of_train in (True, False):
        loader = build_val_loader(config, device=device, of_train=of_train)
        file = cache_file(folder, config, weights, loader)
        if not file.is_file():
            model = model or build_features(config, weights, device)
            with atomic_file(file) as temporary, open(temporary, "wb") as stream:
                np.save(stream, extract(model, loader, config, device))
        loader.close()
        yield Features(np.load(file), loader.dataset.targets, loader.dataset.classes)


def fit_and_score(train: Features, test: Features, seed: int) -> dict[str, tuple[float, float, float]]:
    """Return top-1 and balanced accuracy in percent, and the chosen C (NaN without one), of each method."""
    predictions = {method: (found, math.nan) for method, found in knn(train.values, train.labels, test.values).items()}
    chosen, found = logistic(train.values, train.labels, test.values, seed)
    predictions["logistic regression"] = found, chosen
    return {
        method: (100 * accuracy_score(test.labels, found), 100 * balanced_accuracy_score(test.labels, found), c)
        for method, (found, c) in predictions.items()
    }


def table(train: Features, test: Features, shots: Sequence[int], seeds: int) -> Iterator[str]:
    """Yield the lines of the table: each method on all images and on few, as mean and deviation over the seeds."""
    yield f"{'images per class':18}{'method':22}{'C':20}{'top-1 (%)':>14}{'balanced (%)':>16}"
    drawn = {count: [draw(train.labels, count, seed) for seed in range(seeds)] for count in shots}
    for count, draws in {0: [slice(None)], **drawn}.items():
        parts = [Features(train.values[chosen], train.labels[chosen], train.classes) for chosen in draws]
        runs = [fit_and_score(part, test, seed) for seed, part in enumerate(parts)]
        for method in runs[0]:
            *accuracies, values = zip(*(run[method] for run in runs), strict=True)
            top1, balanced = (
                f"{np.mean(found):.2f}" + (f" ± {np.std(found, ddof=1):.2f}" if len(found) > 1 else "")
                for found in accuracies
            )
            c = " to ".join(f"{value:.2g}" for value in sorted({min(values), max(values)}) if value == value)
            yield f"{count or 'all':<18}{method:22}{c:20}{top1:>14}{balanced:>16}"


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    data = {"DATA.DATA_PATH": args.data_path, **({"DATA.DATASET": args.dataset} if args.dataset else {})}
    config = checkpoint_config(args.checkpoint, args.cfg, opts=args.opts, overrides=data)
    device = select_device(args.device)
    train, test = all_features(config, make_folder(args.cache, "--cache"), args.weights, device)
    if train.classes != test.classes:
        only = sorted(set(test.classes) - set(train.classes))[:5]
        raise ValueError(f"validation has classes that training lacks: {only}")
    if len(train.classes) < 2:
        raise ValueError(f"{args.data_path} has a single class, {train.classes[0]!r}: there is nothing to tell apart")
    warnings.filterwarnings("ignore", message="The number of unique classes is greater")  # few images of each
    print(
        f"{args.checkpoint}: {train.values.shape[1]} features, {len(train.classes)} classes; fitted on training images"
    )
    print(f"(all: {len(train.labels)}), measured on {len(test.labels)} validation images")
    for line in table(train, test, args.shots, args.seeds):
        print(line, flush=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = checkpoint_parser(__doc__)
    number = whole_number(1, 100_000)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--dataset", metavar="NAME", help="name of the data set (default: the configuration's)")
    parser.add_argument(
        "--shots", type=number, nargs="+", default=[], metavar="N", help="also fit to N images per class"
    )
    parser.add_argument("--seeds", type=number, default=3, metavar="N", help="draws of few images (%(default)s)")
    parser.add_argument(
        "--cache", type=expanded_path, default=Path("output/probe"), metavar="DIR", help="(%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(command))
