"""Evaluate one checkpoint, or measure the throughput of a model.

    python main_eval.py --cfg configs/<leaf>.yaml --data-path <folder> --resume <checkpoint>
    python main_eval.py --cfg configs/<leaf>.yaml --throughput

Needs no training set and never looks for a checkpoint by itself: the file that is named is the file that is evaluated.
"""

import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from yacs.config import CfgNode

from data import build_batch_transform, build_val_loader, check_data, check_transform
from models import build_model, check_model, fit_weights, from_published, inference_form
from utils.checkpoint import class_columns, load_weights, resolve_source, sha256, warn_preprocessing, weight_options
from utils.config import input_shape, parse
from utils.runtime import Run, StopRequest, start_run, write_text_atomic
from utils.training import EvalResult, build_precision, evaluate, measure_throughput

logger = logging.getLogger(__name__)

THROUGHPUT_SECONDS = 10.0


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Command line. The exit code is 0 only if the evaluation was completed."""
    run(*parse(argv, "Evaluate one checkpoint, or measure the throughput of a model (--throughput).", evaluation=True))


def run(args: Namespace, config: CfgNode) -> None:
    """Do what the flags ask for: evaluate, or measure throughput."""
    with StopRequest(), start_run(config, training=False) as process:
        if config.THROUGHPUT_MODE:
            throughput(config, process)
        else:
            evaluate_checkpoint(config, process, weights=args.weights)


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
    loader = build_val_loader(config, device=process.device)
    model = build_model(config).to(process.device)
    _, metadata = load_weights(
        model,
        source,
        remap=from_published,
        fit=fit_weights,
        prefer_ema=weights != "model",
        require_ema=weights == "ema",
        **weight_options(config),
    )
    columns = class_columns(loader.dataset.classes, metadata, source, config.MODEL.NUM_CLASSES)
    check_data(config, None, loader.dataset, subset=columns is not None)
    warn_preprocessing(config, metadata, source, model)
    transform = build_batch_transform(config, is_train=False, device=process.device, rank=process.rank)
    with closing(loader):
        result = evaluate(
            inference_form(model),
            loader,
            device=process.device,
            batch_transform=transform,
            autocast=build_precision(config, process.device).autocast,
            columns=columns,
        )
    top5 = f", top-5 {result.acc5:.2f} %" if len(loader.dataset.classes) > 5 else ""
    logger.info(
        "%s: top-1 %.2f %%%s, loss %.4f on %d samples", source, result.acc1, top5, result.loss, result.num_samples
    )
    if process.is_main:
        write_result(config, process, result, source)


def write_result(config: CfgNode, process: Run, result: EvalResult, source: str) -> None:
    """Write ``eval.json``: the result and what it is the result of."""
    row = {
        **asdict(result),
        "checkpoint": source,
        "sha256": sha256(resolve_source(source)),
        "config": config.MODEL.NAME,
        "dataset": config.DATA.DATASET,
        "img_size": config.DATA.IMG_SIZE,
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
