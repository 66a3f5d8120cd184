"""What can be checked of a run without measuring it: settings, data, images, the whole recipe, disk."""

import math
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import torch
from yacs.config import CfgNode

from data import FileSource, ImageDataset, ImageLoader, ShardSource
from models import build_model
from tools.check_data import scan
from tools.dry_run.report import Report
from utils.assembly import check_and_load
from utils.checkpoint import LAST, Room
from utils.config import CIFAR_DATASETS, read_duration, run_folder, short_of_updates
from utils.errors import ImageReadError
from utils.runtime import printable, usable_cores
from utils.session import state_bytes
from utils.training import build_optimizer, global_batch_size, scaled_learning_rates

_SHOWN = 3  # names in a finding

Loaders = tuple[ImageLoader | None, ImageLoader | None]  # of training and validation; None: cannot be made


def dry_config(config: CfgNode) -> CfgNode:
    """Return the configuration of a run that writes nothing.

    It starts where main.py would: that searches the output folder for the newest checkpoint, and may write there.
    """
    dry = config.clone()
    dry.defrost()
    dry.DATA.VAL_CACHE, dry.DATA.DOWNLOAD = "", False
    newest = run_folder(config) / LAST
    if config.TRAIN.AUTO_RESUME and not config.MODEL.RESUME and newest.exists():
        dry.MODEL.RESUME = str(newest)
    dry.freeze()
    return dry


def check_settings_and_data(config: CfgNode, device: torch.device, world_size: int, report: Report) -> Loaders:
    """Do the checks of main.py, all of them; return loaders that go on where a training image cannot be read."""
    dry = dry_config(config)
    dry.defrost()
    dry.DATA.BAD_IMAGES = "skip"
    dry.freeze()
    loaders = check_and_load(dry, device, world_size=world_size, part=report.part)
    if loaders[0] is None and config.DATA.DATASET in CIFAR_DATASETS and config.DATA.DOWNLOAD:
        report.add("main.py would download the data (DATA.DOWNLOAD); this check writes nothing", fails=False)
    counts = {
        part: len(loader.dataset)
        for part, loader in zip(("training", "validation"), loaders, strict=True)
        if loader is not None
    }
    if counts:
        classes = len(next(loader for loader in loaders if loader is not None).dataset.classes)
        images = " and ".join(f"{count:,} {part}" for part, count in counts.items())
        report.row("data", f"{images} images in {classes:,} classes")
        report.figures["data"] = {"classes": classes, **counts}
    return loaders


def check_images(config: CfgNode, loaders: Loaders, size: int, report: Report) -> None:
    """Read up to ``size`` images of each part, chosen by the seed."""
    texts = []
    report.figures["images_read"] = {}
    for part, loader in zip(("training", "validation"), loaders, strict=True):
        if loader is None:
            continue
        chosen = np.random.default_rng(config.SEED).permutation(len(loader.dataset))[:size]
        bad, suspicious = unreadable(loader.dataset, np.sort(chosen).tolist())
        if bad:
            report_bad_images(config, bad, f"of {len(chosen)} {part} images", report, training=part == "training")
        if suspicious:
            text = f"{len(suspicious)} of {len(chosen)} {part} images may be damaged: {_some(suspicious)}"
            report.add(f"{text}; tools/check_data.py FOLDER lists all such files", fails=False)
        report.figures["images_read"][part] = {"read": len(chosen), "bad": len(bad), "suspicious": len(suspicious)}
        texts.append(f"{len(chosen) - len(bad):,} of {len(chosen):,} {part}")
    if texts:
        report.row("images read", f"{' and '.join(texts)} images (a sample of at most {size:,} each)")


def report_bad_images(config: CfgNode, bad: Sequence[str], among: str, report: Report, *, training: bool) -> None:
    """Report images that cannot be read; training can go on without them.

    Args:
        config: of the run.
        bad: paths and reasons.
        among: of which images, such as ``of 500 training images``.
        report: where to.
        training: whether they are training images.
    """
    skipped = training and config.DATA.BAD_IMAGES == "skip"
    other = ", or train without them (DATA.BAD_IMAGES skip)" if training and not skipped else ""
    report.add(
        f"{len(bad)} {among} cannot be read: {_some(bad)}; replace or remove them{other}; tools/check_data.py FOLDER "
        "lists all such files",
        fails=not skipped,
    )


def unreadable(dataset: ImageDataset, indices: Sequence[int]) -> tuple[list[str], list[str]]:
    """Read images; return what is wrong with those that cannot be read, and with those that may be damaged."""
    if isinstance(dataset.source, (FileSource, ShardSource)):
        found = scan(dataset.source, workers=usable_cores(), indices=indices)
        texts = [(each.bad, f"{each.path} ({each.reason})") for each in found]
        return [text for bad, text in texts if bad], [text for bad, text in texts if not bad]
    bad = []
    for index in indices:  # members of an archive, arrays
        try:
            dataset.source.load(index)
        except ImageReadError as error:
            bad.append(f"{dataset.sample_name(index)} ({error})")
    return bad, []


def work_out_recipe(config: CfgNode, loader: ImageLoader | None, world_size: int, report: Report) -> None:
    """Report the updates and images of the whole recipe on so many processes."""
    accumulation, rate = max(1, config.TRAIN.ACCUMULATION_STEPS), scaled_learning_rates(config, world_size).base
    images = global_batch_size(config, world_size)
    parts = f"{config.DATA.BATCH_SIZE} x {world_size} process(es) x {accumulation}"
    report.row("update", f"{images:,} images ({parts}), learning rate {rate:g}")
    batches = 0 if loader is None else len(loader.dataset) // (config.DATA.BATCH_SIZE * world_size)
    if not batches:
        return
    per_epoch = math.ceil(batches / accumulation)
    report.figures["recipe"] = {
        "images_per_update": images,
        "learning_rate": rate,
        "updates_per_epoch": per_epoch,
        "images_per_epoch": batches * config.DATA.BATCH_SIZE * world_size,
    }
    if not read_duration(config.TRAIN.TIME_BUDGET):  # else the length follows from what is measured
        report_length(config.TRAIN.UPDATES or config.TRAIN.EPOCHS * per_epoch, report)
    warning = short_of_updates(config, len(loader.dataset), per_epoch)
    if warning:
        report.add(warning, fails=False)


def report_length(updates: int, report: Report) -> None:
    """Report the epochs and images of a run of ``updates`` updates; ``work_out_recipe`` comes first."""
    recipe = report.figures["recipe"]
    per_epoch = recipe["updates_per_epoch"]
    epochs, rest = divmod(updates, per_epoch)
    seen = epochs * recipe["images_per_epoch"] + rest * recipe["images_per_update"]
    length = f"{updates / per_epoch:,.1f} epochs of {per_epoch:,}" if rest else f"{epochs:,} epochs x {per_epoch:,}"
    report.row("recipe", f"{length} updates = {updates:,}, {seen:,} images seen")
    recipe |= {"epochs": epochs + (rest > 0), "updates": updates, "images_seen": seen}


def check_logger(config: CfgNode, report: Report) -> None:
    """Warn of a logger without its packages; the run goes on without it."""
    needed = {"none": (), "tensorboard": ("tensorboard",), "wandb": ("wandb", "tensorboard")}[config.LOGGER]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        text = f"LOGGER {config.LOGGER} will be off: {' and '.join(missing)} cannot be imported"
        report.add(f"{text}; pip install -r requirements-extra.txt", fails=False)


def check_disk(config: CfgNode, num_classes: int, report: Report) -> None:
    """Compare the checkpoints that the run will keep with the free space of its output folder."""
    with torch.device("meta"):
        model = build_model(config, config.MODEL.NUM_CLASSES or num_classes)
    state = SimpleNamespace(
        model=model,
        optimizer=build_optimizer(config, model, config.TRAIN.BASE_LR),
        ema=model if config.TRAIN.EMA_DECAY > 0 else None,
    )
    folder = run_folder(config)
    epochs = report.figures.get("recipe", {}).get("epochs", config.TRAIN.EPOCHS)
    room = Room.of(config, folder, state_bytes(state), epochs=epochs)
    for problem in filter(None, (room.problem_of_writing, room.problem)):
        report.add(problem)
    free = "free space not known" if room.free is None else f"{size_text(room.free)} free"
    report.row("output", f"{folder}{'' if folder.exists() else ', to be made'}; {free}")
    report.row("checkpoints", f"{room.files} of {size_text(room.size)} at most, {size_text(room.needed)} to be written")
    report.figures["disk"] = {
        "checkpoint_bytes": room.size,
        "checkpoints": room.files,
        "needed_bytes": room.needed,
        "free_bytes": room.free,
    }


def size_text(size: float) -> str:
    """Return a number of bytes in MB or GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _some(names: Iterable[str]) -> str:
    names = [printable(name) for name in names]
    return "; ".join(names[:_SHOWN]) + ("; ..." if len(names) > _SHOWN else "")
