"""Compare data pipelines on the same images, and show where the time of each goes."""

import multiprocessing
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, ConvertImageDtype, Normalize, RandomCrop, RandomHorizontalFlip
from yacs.config import CfgNode

from data import build_batch_transform, build_dataset, build_train_loader, build_val_loader, collate
from tools.bench.report import ROOT, Report, Table
from tools.bench.timing import Spread, paired_ratio, turns
from utils.config import load_config
from utils.runtime import seeded_streams

CONFIG = ROOT / "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"  # the published recipe
SMALL_CONFIG = ROOT / "configs/quickstart_digits.yaml"

# What differs from the default pipeline, by name; the others are compared with the first.
_PIPELINES = {
    "reference": {"DATA.PIPELINE": "reference"},
    "fast (default)": {},
    "fast, FAST_RESIZE": {"DATA.FAST_RESIZE": True},
}

_SMALL_RECIPES = {
    "crop": {},
    "crop+mirror": {"AUG.HFLIP": 0.5},
    "randaugment": {"AUG.HFLIP": 0.5, "AUG.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1"},
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.set_defaults(threads=1)
    parser.add_argument("--data-path", default="", metavar="DIR", help="image folder with train/ and val/")
    parser.add_argument("--cfg", type=Path, default=CONFIG, metavar="FILE", help="config (default: tiny on ImageNet)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="loader processes (default: 0, all in this one)"
    )
    parser.add_argument(
        "--small",
        nargs="*",
        choices=_SMALL_RECIPES,
        help="small images in memory instead: the handwritten digits, under these recipes (default: all), against "
        "plain data sets",
    )
    parser.add_argument(
        "--images", type=int, default=200, metavar="N", help="images for the times of the stages (default: 200)"
    )


def run(args: Namespace, report: Report) -> None:
    """Report the pipelines' speed and the times of their stages, in training and evaluation."""
    if args.small is not None:
        for recipe in args.small or _SMALL_RECIPES:
            report.add(small_table(recipe, batch=args.batch, rounds=args.rounds, device=args.device))
        return
    common = {"DATA.DATA_PATH": args.data_path, "DATA.BATCH_SIZE": args.batch, "DATA.NUM_WORKERS": args.workers}
    with tempfile.TemporaryDirectory() as folder:
        for train in (True, False):
            cached = {"fast, CACHE_DECODED": {"DATA.CACHE_DECODED": "ram"}}
            cached = cached if train else {"fast, VAL_CACHE": {"DATA.VAL_CACHE": folder}}
            configs = {
                name: load_config(args.cfg, overrides={**common, **keys})
                for name, keys in {**_PIPELINES, **cached}.items()
            }
            pipelines = {name: _Pipeline(config, train=train, device=args.device) for name, config in configs.items()}
            title = _title(pipelines["reference"].loader, configs["reference"], train=train)
            report.add(loader_table(pipelines, title, rounds=args.rounds, device=args.device))
            report.add(stage_table(configs, train=train, images=args.images))


class _Pipeline:
    """A loader that can run one epoch after another, and the transform that the device applies to its batches.

    ``loader``: in place of the one that the configuration describes.
    """

    def __init__(self, config: CfgNode, *, train: bool, device: torch.device, loader: DataLoader | None = None) -> None:
        self.loader = loader or (build_train_loader if train else build_val_loader)(config, device=device)
        self.transform = build_batch_transform(config, is_train=train, device=device)
        self.train = train
        self.epoch = 0

    def run(self) -> tuple[float, float, float]:
        """Run an epoch; return the (CPU seconds of loading, its wall seconds, seconds of the transform) per image."""
        if self.train:
            self.loader.sampler.set_progress(self.epoch)
        images, transform_cpu, transform_wall = 0, 0.0, 0.0
        start_cpu, start_wall = _cpu_seconds(), time.perf_counter()
        for batch in self.loader:
            images += len(batch[0])
            before_cpu, before_wall = time.process_time(), time.perf_counter()
            self.transform(*batch, epoch=self.epoch, update=images)
            if self.transform.device.type == "cuda":
                torch.cuda.synchronize(self.transform.device)
            transform_cpu += time.process_time() - before_cpu
            transform_wall += time.perf_counter() - before_wall
        cpu, wall = _cpu_seconds() - start_cpu - transform_cpu, time.perf_counter() - start_wall - transform_wall
        self.epoch += 1
        if not images:
            raise ValueError("an epoch has no whole batch: give a smaller --batch, or more images")
        return cpu / images, wall / images, transform_wall / images


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its living data workers, all threads, so far."""
    workers = [~child.pid << 3 | 2 for child in multiprocessing.active_children()]  # as clock_getcpuclockid(3) on Linux
    return time.process_time() + sum(map(time.clock_gettime, workers))


def loader_table(pipelines: dict[str, _Pipeline], title: str, *, rounds: int, device: torch.device) -> Table:
    """Compare pipelines with the first; in every round each runs an epoch, after one for warm-up.

    Images/s per core is the inverse of the CPU time of this process and its workers together, without the transform on
    the device.
    """
    times: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for name in turns(pipelines, rounds + 1):
        times[name].append(pipelines[name].run())
    first = next(iter(pipelines))
    base_cpu, base_wall, _ = zip(*times[first][1:], strict=True)
    rows = []
    for name in pipelines:
        cpu, wall, transform = zip(*times[name][1:], strict=True)
        rate = Spread.of([1 / seconds for seconds in cpu])
        rows.append(
            {
                "label": name,
                "images_per_second_core": rate.median,
                "range": rate.range,
                "ratio": str(paired_ratio(cpu, base_cpu)),
                "images_per_second": 1 / Spread.of(wall).median,
                "wall_ratio": str(paired_ratio(wall, base_wall)),
                "transform_ms": 1000 * Spread.of(transform).median,
                "cpu_seconds": cpu,
                "wall_seconds": wall,
            }
        )
    columns = [
        ("", "label"),
        ("images/s per core", "images_per_second_core"),
        ("min - max", "range"),
        (f"x {first}", "ratio"),
        ("wall: images/s", "images_per_second"),
        (f"wall: x {first}", "wall_ratio"),
        ("batch: ms per image", "transform_ms"),
    ]
    title += f", {rounds} epochs in turns; per core: by CPU time; batch: the transform on the {device}"
    return Table(title, columns, rows)


def _title(loader: DataLoader, config: CfgNode, *, train: bool) -> str:
    data = config.DATA
    return (
        f"{'training' if train else 'evaluation'} loader, {len(loader.dataset)} images, batch {data.BATCH_SIZE}, "
        f"{data.IMG_SIZE} pixels, {data.NUM_WORKERS} worker(s)"
    )


class _PlainDataset(Dataset):
    """What many would write for small images in memory: a transform for each, no seeds, no errors of its own."""

    def __init__(self, images: Sequence[Any], targets: Sequence[int], transform: Callable) -> None:
        self._images, self._targets, self._transform = images, targets, transform

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self._transform(self._images[index]), self._targets[index], index


def small_table(recipe: str, *, batch: int, rounds: int, device: torch.device) -> Table:
    """Compare the training loader of the digits with plain data sets under one recipe, all in this process.

    ``PIL``: the published transforms. ``tensors``: torchvision's on uint8 tensors, where they can do the recipe.
    """
    keys = {**_SMALL_RECIPES[recipe], "DATA.BATCH_SIZE": batch}
    config = load_config(SMALL_CONFIG, overrides=keys)
    reference = load_config(SMALL_CONFIG, overrides={**keys, "DATA.PIPELINE": "reference"})
    plain = build_dataset(reference, is_train=True)
    pixels, targets = plain.source.images, plain.targets.tolist()
    datasets = {"PIL": _PlainDataset([Image.fromarray(image) for image in pixels], targets, plain.transform)}
    if config.AUG.AUTO_AUGMENT == "none":
        stages = (RandomCrop(config.DATA.IMG_SIZE, padding=4), RandomHorizontalFlip(config.AUG.HFLIP))
        transform = Compose([*stages, ConvertImageDtype(torch.float32), Normalize(config.DATA.MEAN, config.DATA.STD)])
        datasets["tensors"] = _PlainDataset(torch.tensor(pixels).permute(0, 3, 1, 2).contiguous(), targets, transform)
    pipelines = {
        f"plain data set, {name}": _Pipeline(
            config,
            train=False,
            device=device,
            loader=DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True),
        )
        for name, dataset in datasets.items()
    }
    pipelines["fast (default)"] = _Pipeline(config, train=True, device=device)
    title = _title(pipelines["fast (default)"].loader, config, train=True).replace("loader", f"loader, {recipe}", 1)
    return loader_table(pipelines, title, rounds=rounds, device=device)


def stage_table(configs: dict[str, CfgNode], *, train: bool, images: int) -> Table:
    """Measure the CPU time of each stage of each pipeline, in one process."""
    times = {name: _stages(config, train=train, images=images) for name, config in configs.items()}
    names = list(dict.fromkeys(stage for stages in times.values() for stage in stages))
    rows: list[dict[str, Any]] = []
    for stage in [*names, "sum"]:
        row: dict[str, Any] = {"label": stage}
        for name, stages in times.items():
            total = sum(stages.values())
            row[f"{name} seconds"] = own = total if stage == "sum" else stages.get(stage)
            row[name] = None if own is None else f"{1000 * own:.2f} ({100 * own / total:.0f} %)"
        rows.append(row)
    title = f"{'training' if train else 'evaluation'}: CPU milliseconds per image by stage, mean of {images} images"
    return Table(title, [("", "label"), *((name, name) for name in times)], rows)


def _stages(config: CfgNode, *, train: bool, images: int) -> dict[str, float]:
    """Return the CPU seconds per image of each stage, in the order of the pipeline."""
    dataset = build_dataset(config, is_train=train)
    chain = dataset.transform.transforms if isinstance(dataset.transform, Compose) else [dataset.transform]
    spent: dict[str, float] = defaultdict(float)
    clock = time.process_time()

    def lap(stage: str) -> None:
        nonlocal clock
        spent[stage] += time.process_time() - clock
        clock = time.process_time()

    samples = []
    for index in (number % len(dataset) for number in range(images)):
        clock = time.process_time()
        picture = dataset.source.load(index)
        lap("read, decode")
        with seeded_streams(0, index):
            clock = time.process_time()
            for stage in chain:
                picture = stage(picture)
                lap(getattr(stage, "__name__", type(stage).__name__))
        samples.append((picture, 0, index))
        if len(samples) == config.DATA.BATCH_SIZE:
            clock = time.process_time()
            collate(samples)
            lap("collate")
            samples.clear()
    return {stage: seconds / images for stage, seconds in spent.items()}
