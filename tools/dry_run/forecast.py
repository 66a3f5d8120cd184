"""Measure a run for a minute, and predict its end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice

import torch
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data import build_val_loader
from main import update
from tools.dry_run.checks import Loaders, dry_config, report_bad_images, size_text
from tools.dry_run.report import Report
from tools.dry_run.trials import Stream, time_evaluation, time_loader, time_updates
from utils.assembly import assemble_session, build_training, load_starting_point
from utils.runtime import Run, StopRequest, usable_cores
from utils.session import Session
from utils.training import Progress, TrainState, peak_memory_mib

_ENOUGH = 0.9  # share of the speed of computing that loading has to reach, and of a GPU's memory that may be taken


@dataclass(frozen=True)
class Speeds:
    """Images per second of one process; 0 where the trial has failed.

    Attributes:
        loading: the loader alone, on the real data.
        training: the loop of main.py.
        waiting: the share of its time in which it waited for data.
        computing: the loop on a repeated batch.
        evaluation: the evaluation.
    """

    loading: float = 0.0
    training: float = 0.0
    waiting: float = 0.0
    computing: float = 0.0
    evaluation: float = 0.0


def is_measurable(loaders: Loaders, report: Report) -> bool:
    """Return whether there are a model and a batch to train it on."""
    loader = loaders[0]
    if loader is None or report.failed("configuration", "transform", "model", "compiler"):
        return False
    targets = loader.dataset.targets
    return len(loader) > 0 and targets.min() >= 0 and targets.max() < len(loader.dataset.classes)


def forecast(
    config: CfgNode,
    run: Run,
    loaders: Loaders,
    report: Report,
    *,
    world_size: int,
    seconds: float,
    allow_change: Sequence[str] = (),
    say: Callable[[str], None],
) -> None:
    """Report speeds and memory, measured for some seconds each, and the predicted end.

    Args:
        config: of the run.
        run: the dry run.
        loaders: of ``check_settings_and_data``.
        report: what has been found so far.
        world_size: number of processes to predict for.
        seconds: length of a trial.
        allow_change: keys that may differ from those of the checkpoint that the run continues from.
        say: tells the user what is being done.
    """
    loader, val_loader = loaders
    dry = dry_config(config)
    fits = not report.failed("classes and batch")
    if not fits:  # measure with the head that the training images need
        dry.defrost()
        dry.MODEL.NUM_CLASSES, dry.TRAIN.CLASS_WEIGHTS = 0, "none"
        val_loader = None
    if val_loader is None:  # evaluating training images takes as long
        val_loader = build_val_loader(dry, device=run.device, of_train=True)
    with report.part("model"), assemble_session(dry, run, StopRequest(), loader, val_loader, update=update) as session:
        model, state = build_training(session)
        with report.part("starting point"):
            if fits:
                load_starting_point(state, session, allow_change)
            if state.progress.global_step:
                report.row("start", f"{dry.MODEL.RESUME}, after {session.position_text(state.progress)}")
        speeds = measure(model, state, session, seconds=seconds, report=report, say=say)
        met = [loader.dataset.sample_name(index) for index in loader.dataset.bad_indices()]
        bad = [name for name in met if not report.mentions(name)]
        if bad:
            report_bad_images(config, bad, "of the images of the trials", report, training=True)
        report_memory(run.device, report)
        with report.part("speed"):
            report_speeds(speeds, session, report)
        images = 0 if loaders[1] is None else len(loaders[1].dataset)
        predict(config, speeds, state.progress, report, images=images, device=run.device, world_size=world_size)


def measure(
    model: DistributedDataParallel,
    state: TrainState,
    session: Session,
    *,
    seconds: float,
    report: Report,
    say: Callable[[str], None],
) -> Speeds:
    """Run the trials, one after the other; one that fails does not stop the others."""
    loader, found = session.loader, {}
    with report.part("loading"):
        say("measuring the loader")
        found["loading"] = time_loader(loader, seconds)
    with report.part("training"):
        say("measuring training")
        pace = time_updates(model, state, session, Stream(loader), seconds)
        found["training"], found["waiting"] = pace.images_per_second, pace.wait_share
    with report.part("evaluation"):
        say("measuring evaluation")
        found["evaluation"] = time_evaluation(state, session, seconds)
    with report.part("computing"):
        say("measuring computing alone")
        group = list(islice(loader, session.accumulation))
        found["computing"] = time_updates(model, state, session, Stream(loader, group), seconds).images_per_second
    return Speeds(**found)


def report_memory(device: torch.device, report: Report) -> None:
    """Report the largest amount of memory that the trials took."""
    peak = round(peak_memory_mib(device) * 2**20)
    report.figures["peak_memory_bytes"] = peak
    if device.type == "cpu":
        report.row("memory", f"{size_text(peak)} resident at peak, without the data workers")
        return
    total = torch.cuda.get_device_properties(device).total_memory
    report.row("memory", f"{size_text(peak)} of {size_text(total)} allocated at peak")
    if peak > _ENOUGH * total:
        report.add(
            f"memory: {size_text(peak)} of the GPU's {size_text(total)} are taken at peak, which leaves little: lower "
            "DATA.BATCH_SIZE and raise TRAIN.ACCUMULATION_STEPS",
            fails=False,
        )


def report_speeds(speeds: Speeds, session: Session, report: Report) -> None:
    """Report images per second, and the workers that are needed so that the device does not wait for data."""
    report.row(
        "images/s",
        f"training {speeds.training:,.1f} (waits for data {speeds.waiting:.0%}); computing alone "
        f"{speeds.computing:,.1f}, loading alone {speeds.loading:,.1f}",
    )
    report.figures["images_per_second"] = {
        "training": speeds.training,
        "computing": speeds.computing,
        "loading": speeds.loading,
        "evaluation": speeds.evaluation,
    }
    report.figures["data_wait"] = speeds.waiting
    if not (speeds.loading and speeds.computing):
        return
    if speeds.training * _ENOUGH > speeds.computing:
        report.add(
            "other programs disturb the measurement: with its data ready, training was slower than with loading; "
            "measure again, and longer (--seconds)",
            fails=False,
        )
    workers, cores = session.loader.num_workers, usable_cores()
    needed = math.ceil(speeds.computing * max(1, workers) / speeds.loading)
    present = f"{workers} worker(s)" if workers else "no workers: the training process loads"
    report.row("loader", f"{present}, {cores} core(s); {needed} worker(s) would keep the device busy")
    report.figures["workers"] = {"present": workers, "needed": needed, "cores": cores}
    on_gpu = session.run.device.type == "cuda"  # on a CPU, loading and computing share the cores
    if (speeds.loading < _ENOUGH * speeds.computing) if on_gpu else (speeds.waiting > 1 - _ENOUGH):
        report.add(
            f"training waits for data: loading gives {speeds.loading:,.0f} images/s, computing alone takes "
            f"{speeds.computing:,.0f}; in this order: DATA.NUM_WORKERS {needed} where there are as many cores, "
            "DATA.PIPELINE fast, DATA.CACHE_DECODED ram if the images fit, DATA.FAST_RESIZE True, a faster disk, more "
            "cores (docs/PERFORMANCE.md)",
            fails=False,
        )


def predict(
    config: CfgNode,
    speeds: Speeds,
    progress: Progress,
    report: Report,
    *,
    images: int,
    device: torch.device,
    world_size: int,
) -> None:
    """Report the end of the run, taking N processes for N times as fast as one.

    Args:
        config: of the run.
        speeds: of one process.
        progress: where the run starts.
        report: its figures hold the recipe.
        images: to evaluate on.
        device: the kind of device.
        world_size: number of processes.
    """
    recipe, epochs = report.figures.get("recipe"), config.TRAIN.EPOCHS
    if recipe is None or not speeds.training:
        return
    left = recipe["images_seen"] * (1 - progress.epoch / epochs) - progress.samples_seen
    seconds = max(0.0, left) / (speeds.training * world_size)
    if images and speeds.evaluation:
        each = images / (speeds.evaluation * world_size)
        interval = config.TEST.INTERVAL
        times = sum(e % interval == 0 or e == epochs for e in range(progress.epoch + 1, epochs + 1))
        report.row("evaluation", f"{each:,.1f} s for {images:,} images, {times:,} time(s)")
        report.figures["evaluation"] = {"seconds": each, "times": times}
        seconds += times * each
    hours, finish = seconds / 3600, datetime.now().astimezone() + timedelta(seconds=seconds)
    unit, units = ("GPU", world_size) if device.type == "cuda" else ("core", world_size * usable_cores(shared=False))
    assumed = f", if {world_size} processes are {world_size} times as fast as one" if world_size > 1 else ""
    length = timedelta(seconds=round(seconds))
    report.row("finish", f"{finish:%Y-%m-%d %H:%M}, in {length}; {units * hours:,.2f} {unit}-hours{assumed}")
    report.figures["predicted"] = {
        "finish": finish.isoformat(timespec="minutes"),
        "hours": hours,
        f"{unit.lower()}_hours": units * hours,
        "assumes": "linear scaling over processes; saving takes no time",
    }
