"""Measure a run for a minute, and predict its end."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from itertools import count

import torch
from yacs.config import CfgNode

from data import ImageLoader, build_val_loader
from main import train_one_epoch, update, validate
from tools.dry_run.checks import Loaders, dry_config, report_bad_images, report_length, size_text
from tools.dry_run.report import Report
from utils.assembly import assemble_session, build_training, load_starting_point
from utils.config import with_values
from utils.rehearsal import rehearse
from utils.runtime import Run, StopRequest, usable_cores
from utils.session import Batch, Session
from utils.training import Costs, Progress, peak_memory_mib, plan_length

_ENOUGH = 0.9  # share of the speed of computing that loading has to reach, and of a GPU's memory that may be taken


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
    seconds_used: float = 0.0,
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
        seconds_used: what those checks took that the run makes, too; they count towards a time budget.
        allow_change: keys that may differ from those of the checkpoint that the run continues from.
        say: tells the user what is being done.
    """
    fits, images = not report.failed("classes and batch"), config.TRAIN.GLOBAL_BATCH
    dry, val_loader = what_to_measure(config, loaders, run.device, world_size, fits=fits)
    stop = StopRequest()
    with report.part("model"), assemble_session(dry, run, stop, loaders[0], val_loader, update=update) as session:
        session = replace(session, config=with_values(session.config, {"TRAIN.GLOBAL_BATCH": images}))
        costs, loading, begun = None, 0.0, time.monotonic()
        with report.part("loading"):
            say("measuring the loader")
            loading = time_loader(session.loader, seconds)
        session.budget.continue_from(seconds_used - (time.monotonic() - begun))
        model, state = build_training(session)
        with report.part("training"):
            say("measuring training, evaluation and saving")
            parts = {"train_one_epoch": train_one_epoch, "validate": validate}
            costs = rehearse(model, state, session, **parts, seconds=seconds)
        with report.part("starting point"):
            if fits:
                load_starting_point(state, session, allow_change)
            if dry.MODEL.RESUME:
                report.row("start", f"{dry.MODEL.RESUME}, after {session.position_text(state.progress)}")
        report_bad_images_met(session, report)
        report_memory(run.device, report)
        if costs is not None:
            report_speeds(session, costs, loading, report)
            images = 0 if loaders[1] is None else len(loaders[1].dataset)
            predict(session, state.progress, costs, report, images=images, world_size=world_size)


def check_starting_point(
    config: CfgNode, run: Run, loaders: Loaders, report: Report, *, world_size: int, allow_change: Sequence[str]
) -> None:
    """Report whether the run can start from the files it names, without measuring; the arguments of ``forecast``."""
    dry, val_loader = what_to_measure(config, loaders, run.device, world_size, fits=True)
    if not (dry.MODEL.RESUME or dry.MODEL.PRETRAINED):
        return
    session = assemble_session(dry, run, StopRequest(), loaders[0], val_loader, update=update)
    with report.part("starting point"), session as assembled:
        load_starting_point(build_training(assembled)[1], assembled, allow_change)


def what_to_measure(
    config: CfgNode, loaders: Loaders, device: torch.device, world_size: int, *, fits: bool
) -> tuple[CfgNode, ImageLoader]:
    """Return a configuration that writes nothing, and a loader for the evaluation.

    Of the images of an update, this process plans the share of one of ``world_size``. ``fits``: the data fit the head.
    """
    dry, val_loader = dry_config(config), loaders[1]
    dry = with_values(dry, {"TRAIN.GLOBAL_BATCH": config.TRAIN.GLOBAL_BATCH // world_size})
    if not fits:  # measure with the head that the training images need
        dry = with_values(dry, {"MODEL.NUM_CLASSES": 0, "TRAIN.CLASS_WEIGHTS": "none"})
        val_loader = None
    if val_loader is None:  # evaluating training images takes as long
        val_loader = build_val_loader(dry, device=device, of_train=True)
    return dry, val_loader


def time_loader(loader: ImageLoader, seconds: float) -> float:
    """Return the images per second that a training loader gives if nothing else is done.

    The batches that its workers have ready at the start do not count, unless they take ``seconds``.
    """

    def batches() -> Iterator[Batch]:
        for epoch in count():
            loader.sampler.set_progress(epoch)
            yield from loader

    ready = max(1, loader.num_workers * (loader.prefetch_factor or 0))
    images, begun = 0, time.perf_counter()
    for number, (batch, _, _) in enumerate(batches(), start=1):
        images += len(batch)
        spent = time.perf_counter() - begun
        if spent >= seconds:
            return images / spent
        if number == ready:
            images, begun = 0, time.perf_counter()


def predict(
    session: Session, progress: Progress, costs: Costs, report: Report, *, images: int, world_size: int
) -> None:
    """Report the end of the run, taking N processes for N times as fast as one.

    Args:
        session: of one process.
        progress: where the run starts.
        costs: as measured on one process.
        report: its figures hold the recipe.
        images: to evaluate on.
        world_size: number of processes.
    """
    config, recipe = session.config, report.figures.get("recipe")
    if recipe is None:
        return
    share = images / len(session.val_loader.dataset) / world_size  # of the evaluation that was measured
    costs = replace(costs, evaluation=costs.evaluation * share)
    per_epoch = recipe["updates_per_epoch"]
    done = progress.epoch * per_epoch + math.ceil(progress.samples_seen / recipe["images_per_update"])
    if session.budget.seconds:
        if not config.TRAIN.UPDATES:
            with report.part("time budget"):
                before = f"{session.budget.used:.0f} s of it before training"
                report.row("time budget", f"{config.TRAIN.TIME_BUDGET}, {before}")
                config = plan_length(config, costs, session.budget, per_epoch, done=done)
        if not config.TRAIN.UPDATES:
            return
        report_length(config.TRAIN.UPDATES, report)
    updates, epochs = recipe["updates"], recipe["epochs"]
    ends = done >= updates
    left = 0 if ends else epochs - progress.epoch
    times = 0 if ends else math.ceil(epochs / config.TEST.INTERVAL) - progress.epoch // config.TEST.INTERVAL
    if images:
        report.row("evaluation", f"{costs.evaluation:,.1f} s for {images:,} images, {times:,} time(s)")
        report.figures["evaluation"] = {"seconds": costs.evaluation, "times": times}
    report.row("epoch", f"{costs.epoch:,.2f} s for start and records, {left:,} time(s)")
    report.row("saving", f"{costs.save:,.2f} s that training waits for each checkpoint")
    report.figures["seconds"] = asdict(costs)
    seconds = 0.0 if ends else costs.of_rest(config, updates, per_epoch, done=done)
    report_end(seconds, report, device=session.run.device, world_size=world_size)


def report_end(seconds: float, report: Report, *, device: torch.device, world_size: int) -> None:
    """Report when a run ends that takes ``seconds`` from now, and the hours of the devices."""
    hours, finish = seconds / 3600, datetime.now().astimezone() + timedelta(seconds=seconds)
    unit, units = ("GPU", world_size) if device.type == "cuda" else ("core", world_size * usable_cores(shared=False))
    assumed = f", if {world_size} processes are {world_size} times as fast as one" if world_size > 1 else ""
    length = timedelta(seconds=round(seconds))
    report.row("finish", f"{finish:%Y-%m-%d %H:%M}, in {length}; {units * hours:,.2f} {unit}-hours{assumed}")
    report.figures["predicted"] = {
        "finish": finish.isoformat(timespec="minutes"),
        "hours": hours,
        f"{unit.lower()}_hours": units * hours,
        "assumes": "linear scaling over processes",
    }


def report_bad_images_met(session: Session, report: Report) -> None:
    """Report the training images that could not be read in the trials, and were not reported before."""
    dataset = session.loader.dataset
    met = [dataset.sample_name(index) for index in dataset.bad_indices()]
    bad = [name for name in met if not report.mentions(name)]
    if bad:
        report_bad_images(session.config, bad, "of the images of the trials", report, training=True)


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


def report_speeds(session: Session, costs: Costs, loading: float, report: Report) -> None:
    """Report images per second, and the workers that are needed so that the device does not wait for data.

    Args:
        session: of one process.
        costs: as measured.
        loading: images per second of the loader alone; 0 if it has failed.
        report: where to.
    """
    waiting = costs.data_wait
    training = session.config.DATA.BATCH_SIZE * session.accumulation / costs.update
    computing = training / (1 - waiting)
    report.row(
        "images/s",
        f"training {training:,.1f} (waits for data {waiting:.0%}); computing alone {computing:,.1f}, "
        f"loading alone {loading:,.1f}",
    )
    report.figures["images_per_second"] = {
        "training": training,
        "computing": computing,
        "loading": loading,
        "evaluation": len(session.val_loader.dataset) / costs.evaluation,
    }
    report.figures["data_wait"] = waiting
    if not loading:
        return
    workers, cores = session.loader.num_workers, usable_cores()
    needed = math.ceil(computing * max(1, workers) / loading)
    present = f"{workers} worker(s)" if workers else "no workers: the training process loads"
    report.row("loader", f"{present}, {cores} core(s); {needed} worker(s) would keep the device busy")
    report.figures["workers"] = {"present": workers, "needed": needed, "cores": cores}
    on_gpu = session.run.device.type == "cuda"  # on a CPU, loading and computing share the cores
    if (loading < _ENOUGH * computing) if on_gpu else (waiting > 1 - _ENOUGH):
        report.add(
            f"training waits for data: loading gives {loading:,.0f} images/s, computing alone takes "
            f"{computing:,.0f}; in this order: DATA.NUM_WORKERS {needed} where there are as many cores, "
            "DATA.PIPELINE fast, DATA.CACHE_DECODED ram if the images fit, DATA.FAST_RESIZE True, a faster disk, more "
            "cores (docs/PERFORMANCE.md)",
            fails=False,
        )
