"""Evaluate one checkpoint, or measure the throughput of a model.

    python main_eval.py <checkpoint> --data-path <folder>
    python main_eval.py --cfg configs/<leaf>.yaml --data-path <folder> --resume <weights of other origin>
    python main_eval.py --cfg configs/<leaf>.yaml --throughput

Needs no training set and never looks for a checkpoint by itself: the file that is named is the file that is evaluated.
"""

import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from yacs.config import CfgNode

from data import build_val_loader, check_transform
from inference import evaluate_opened, load_model
from models import build_model, check_model, inference_form
from utils.checkpoint import preprocessing, resolve_source, sha256, stored_config
from utils.config import input_shape, parse
from utils.runtime import Run, StopRequest, phase, start_run, write_text_atomic
from utils.training import (
    ALEXNET_ERRORS,
    SEVERITIES,
    EvalResult,
    RealAccuracy,
    build_precision,
    check_corruption_folders,
    corruption_summary,
    corruption_table,
    measure_throughput,
    read_real_labels,
)

logger = logging.getLogger(__name__)

THROUGHPUT_SECONDS = 10.0
IMAGENET_CLASSES = 1000  # of the data that AlexNet's errors are for


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Command line. The exit code is 0 only if the evaluation was completed."""
    purpose = "Evaluate one checkpoint, or measure the throughput of a model (--throughput)."
    run(*parse(argv, purpose, evaluation=True, stored_config=stored_config))


def run(args: Namespace, config: CfgNode) -> None:
    """Do what the flags ask for: evaluate, or measure throughput."""
    with StopRequest(), start_run(config, training=False) as process:
        if config.THROUGHPUT_MODE:
            throughput(config, process)
        else:
            evaluate_checkpoint(config, process, weights=args.weights)


@phase("evaluating")
def evaluate_checkpoint(config: CfgNode, process: Run, *, weights: str | None = None) -> None:
    """Evaluate the file of ``--resume`` (or ``--pretrained``), log the result and write ``eval.json``.

    Args:
        config: frozen config.
        process: the run.
        weights: 'ema' or 'model'; None takes the averaged weights where the file has them, as training ranked them.

    Raises:
        ValueError: no file is named, or the data set does not fit the config.
        CheckpointError, FileNotFoundError: the file cannot be used, or was trained on other classes.
    """
    source = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if not source:
        raise ValueError("no checkpoint to evaluate: name one with --resume FILE")
    check_transform(config)
    check_model(config, process.device, training=False)
    row = corruption_row(config, process, weights) if config.TEST.CORRUPTIONS else clean_row(config, process, weights)
    if process.is_main:
        write_result(config, process, {**row, "weights": weights or "averaged if there are any"}, source)


def clean_row(config: CfgNode, process: Run, weights: str | None) -> dict[str, Any]:
    """Evaluate on the validation set, log the result and return it for ``eval.json``; see ``evaluate_checkpoint``."""
    real = None
    with closing(build_val_loader(config, device=process.device)) as loader:
        dataset = loader.dataset
        if config.TEST.REAL_LABELS:
            names = [dataset.sample_name(index) for index in range(len(dataset))]
            labels = read_real_labels(config.TEST.REAL_LABELS, names, dataset.classes)
            real = RealAccuracy(labels, process.device)
        opened = load_model(config, process.device, weights=weights, num_classes=len(dataset.classes))
        result = evaluate_opened(opened, loader, rank=process.rank, observe=real and real.observe)
    log_result(result, config.MODEL.RESUME or config.MODEL.PRETRAINED, num_classes=len(dataset.classes))
    if real is None:
        return asdict(result)
    accuracy, counted = real.result()
    logger.info("ImageNet-ReaL: top-1 %.2f %% on %d samples with labels", accuracy, counted)
    return {**asdict(result), "real_acc1": accuracy, "real_num_samples": counted}


def corruption_row(config: CfgNode, process: Run, weights: str | None) -> dict[str, Any]:
    """Evaluate on each corruption and severity of TEST.CORRUPTIONS, log a table and return it for ``eval.json``."""
    if config.TEST.REAL_LABELS:
        raise ValueError("TEST.REAL_LABELS is for the validation set, not for TEST.CORRUPTIONS; set one of them")
    check_corruption_folders(config.TEST.CORRUPTIONS)
    opened, errors, counted = None, {}, []
    for name in ALEXNET_ERRORS:
        plain = class_folders_config(config, Path(config.TEST.CORRUPTIONS) / name)
        for severity in SEVERITIES:
            with closing(build_val_loader(plain, device=process.device, part=str(severity))) as loader:
                classes = loader.dataset.classes
                if opened is None:
                    opened = load_model(config, process.device, weights=weights, num_classes=len(classes))
                    opened = replace(opened, model=inference_form(opened.model))  # once for all
                result = evaluate_opened(replace(opened, config=plain), loader, rank=process.rank, quiet=bool(counted))
            error = 100.0 - result.acc1
            logger.info("%s, severity %d: error %.2f %% on %d samples", name, severity, error, result.num_samples)
            errors.setdefault(name, []).append(error)
            counted.append(result.num_samples)
    summary = corruption_summary(errors, normalise=len(classes) == IMAGENET_CLASSES)
    logger.info("corruptions of %s:\n%s", config.TEST.CORRUPTIONS, corruption_table(summary))
    return {**summary, "num_samples": sum(counted)}


def class_folders_config(config: CfgNode, folder: Path) -> CfgNode:
    """Return a frozen copy of the configuration whose data are folders of classes below ``folder``."""
    config = config.clone()
    config.defrost()
    config.DATA.DATASET, config.DATA.DATA_PATH = "folder", str(folder)
    config.DATA.ZIP_MODE, config.DATA.HOLDOUT = False, 0.0
    config.freeze()
    return config


def log_result(result: EvalResult, source: str, *, num_classes: int) -> None:
    """Log the result; top-5 only where it says something."""
    top5 = f", top-5 {result.acc5:.2f} %" if num_classes > 5 else ""
    logger.info(
        "%s: top-1 %.2f %%%s, balanced accuracy %.2f %%, loss %.4f on %d samples",
        source,
        result.acc1,
        top5,
        result.balanced_acc1,
        result.loss,
        result.num_samples,
    )


def write_result(config: CfgNode, process: Run, row: dict[str, Any], source: str) -> None:
    """Write ``eval.json``: the result, what it is the result of, and how it was made."""
    row = {
        **row,
        "checkpoint": source,
        "sha256": sha256(resolve_source(source)),
        "config": config.MODEL.NAME,
        "dataset": config.DATA.DATASET,
        "img_size": config.DATA.IMG_SIZE,
        "data_path": config.DATA.DATA_PATH,
        "preprocessing": preprocessing(config),
        "test": dict(config.TEST),
    }
    write_text_atomic(process.output_dir / "eval.json", json.dumps(row, indent=1) + "\n")
    logger.info("written to %s", process.output_dir / "eval.json")


def throughput(config: CfgNode, process: Run) -> None:
    """Log the images per second of the forward pass on random images; neither data nor a checkpoint is needed."""
    check_model(config, process.device, training=False)
    model: nn.Module = build_model(config).to(process.device).eval()
    model = inference_form(model)
    precision = build_precision(config, process.device)
    images = torch.randn(config.DATA.BATCH_SIZE, *input_shape(config), device=process.device)
    images = images.to(memory_format=torch.channels_last)
    rate = measure_throughput(model, images, autocast=precision.autocast, seconds=THROUGHPUT_SECONDS)
    logger.info(
        "throughput of %s: %.1f images/s (batch %d, %d x %d, %s)",
        config.MODEL.NAME,
        rate,
        config.DATA.BATCH_SIZE,
        *images.shape[2:],
        precision.description,
    )


if __name__ == "__main__":
    main()
