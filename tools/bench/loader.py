"""Tables of loader speed: the pipelines against each other on the same images, and where the time of each goes."""

import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import Compose
from yacs.config import CfgNode

from data import build_batch_transform, build_dataset, build_train_loader, build_val_loader, collate
from tools.bench.report import Table
from tools.bench.timing import Spread, paired_ratio
from utils.config import load_config
from utils.runtime import seeded_streams

CONFIG = Path("configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml")  # the published recipe

# What differs from the default pipeline, by name; the first is what the others are compared with.
TRAIN = {
    "reference": {"DATA.PIPELINE": "reference"},
    "fast (default)": {},
    "fast, FAST_RESIZE": {"DATA.FAST_RESIZE": True},
    "fast, CACHE_DECODED": {"DATA.CACHE_DECODED": "ram"},
}
EVAL = {
    "reference": {"DATA.PIPELINE": "reference"},
    "fast (default)": {},
    "fast, FAST_RESIZE": {"DATA.FAST_RESIZE": True},
    "fast, VAL_CACHE": {"DATA.VAL_CACHE": "{folder}"},
}


def pipeline_configs(
    data_path: str, *, train: bool, batch: int, workers: int, folder: Path, cfg: Path = CONFIG
) -> dict[str, CfgNode]:
    """The config of each pipeline, by name; ``folder`` takes the validation cache."""
    common = {"DATA.DATA_PATH": data_path, "DATA.BATCH_SIZE": batch, "DATA.NUM_WORKERS": workers}
    configs = {}
    for name, keys in (TRAIN if train else EVAL).items():
        keys = {key: str(folder) if value == "{folder}" else value for key, value in keys.items()}
        configs[name] = load_config(cfg, overrides={**common, **keys})
    return configs


class _Pipeline:
    """A loader that can be run for one epoch after another, and what the device does with its batches."""

    def __init__(self, config: CfgNode, *, train: bool, device: torch.device) -> None:
        self.loader = (build_train_loader if train else build_val_loader)(config, device=device)
        self.transform = build_batch_transform(config, is_train=train, device=device)
        self.train = train
        self.epoch = 0

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The batches of the next epoch."""
        if self.train:
            self.loader.sampler.set_progress(self.epoch)
        self.epoch += 1
        return iter(self.loader)

    def run(self) -> tuple[float, float, float]:
        """Run one epoch; return (CPU seconds of loader and workers, wall seconds, seconds of transform) an image."""
        start, images = (_cpu_seconds(), time.perf_counter()), 0
        transform = [0.0, 0.0]  # CPU and wall seconds
        for batch in self.batches():
            images += len(batch[0])
            before = time.process_time(), time.perf_counter()
            self.transform(*batch, epoch=self.epoch, update=images)
            if self.transform.device.type == "cuda":
                torch.cuda.synchronize(self.transform.device)
            transform[0] += time.process_time() - before[0]
            transform[1] += time.perf_counter() - before[1]
        cpu, wall = _cpu_seconds() - start[0] - transform[0], time.perf_counter() - start[1] - transform[1]
        return cpu / images, wall / images, transform[1] / images


def _cpu_seconds() -> float:
    """CPU time of this process and its data workers so far."""
    workers = (Path(f"/proc/{child.pid}/schedstat") for child in multiprocessing.active_children())
    return time.process_time() + sum(int(path.read_text().split()[0]) * 1e-9 for path in workers)


def loader_table(configs: dict[str, CfgNode], *, train: bool, rounds: int, device: torch.device) -> Table:
    """Compare pipelines; every round runs an epoch of each, in turned order, after one for warm-up.

    CPU time is that of this process and its workers together, without the transform on the device; images/s a core is
    its inverse.
    """
    pipelines = {name: _Pipeline(config, train=train, device=device) for name, config in configs.items()}
    times: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for number in range(rounds + 1):
        for name in pipelines if number % 2 else reversed(pipelines):
            times[name].append(pipelines[name].run())
    rows = []
    first = next(iter(pipelines))
    for name in pipelines:
        cpu, wall, transform = zip(*times[name][1:], strict=True)
        base_cpu, base_wall, _ = zip(*times[first][1:], strict=True)
        spread = Spread.of([1 / t for t in cpu])
        rows.append(
            {
                "label": name,
                "images_per_second_core": spread.median,
                "spread": f"{spread.low:.3g} - {spread.high:.3g}",
                "ratio": _ratio(cpu, base_cpu),
                "images_per_second": 1 / Spread.of(wall).median,
                "wall_ratio": _ratio(wall, base_wall),
                "transform_ms": 1000 * Spread.of(transform).median,
                "cpu_seconds": cpu,
                "wall_seconds": wall,
            }
        )
    config = configs[first]
    columns = [
        ("", "label"),
        ("images/s a core", "images_per_second_core"),
        ("min - max", "spread"),
        (f"x {first}", "ratio"),
        ("images/s", "images_per_second"),
        (f"x {first}", "wall_ratio"),
        (f"ms an image on the {device.type}", "transform_ms"),
    ]
    count = len(pipelines[first].loader.dataset)
    title = (
        f"{'training' if train else 'evaluation'} loader, {count} images, batch {config.DATA.BATCH_SIZE}, "
        f"{config.DATA.IMG_SIZE} pixels, {config.DATA.NUM_WORKERS} worker(s), {rounds} interleaved epochs; "
        "a core: CPU time; then wall time"
    )
    return Table(title, columns, rows)


def _ratio(own: Sequence[float], base: Sequence[float]) -> str:
    ratio = paired_ratio(own, base)
    return f"{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})"


def stage_table(configs: dict[str, CfgNode], *, train: bool, images: int) -> Table:
    """CPU time of each stage of each pipeline, in one process."""
    shares = {name: _stages(config, train=train, images=images) for name, config in configs.items()}
    stages = list(dict.fromkeys(stage for times in shares.values() for stage in times))
    rows: list[dict[str, Any]] = []
    for stage in [*stages, "sum"]:
        row: dict[str, Any] = {"label": stage}
        for name, times in shares.items():
            total = sum(times.values())
            own = total if stage == "sum" else times.get(stage)
            row[name] = None if own is None else f"{1000 * own:.2f} ({100 * own / total:.0f} %)"
            row[f"{name} seconds"] = own
        rows.append(row)
    title = f"{'training' if train else 'evaluation'}: CPU milliseconds an image by stage, mean of {images} images"
    return Table(title, [("", "label"), *((name, name) for name in shares)], rows)


def _stages(config: CfgNode, *, train: bool, images: int) -> dict[str, float]:
    """CPU seconds an image of each stage, in the order of the pipeline."""
    dataset = build_dataset(config, is_train=train)
    chain = dataset.transform.transforms if isinstance(dataset.transform, Compose) else [dataset.transform]
    spent: dict[str, float] = defaultdict(float)
    samples = []
    for index in range(images):
        index %= len(dataset)
        if hasattr(dataset.source, "read"):
            start = time.process_time()
            dataset.source.read(index)
            read = time.process_time() - start
            spent["read"] += read
        else:
            read = 0.0
        start = time.process_time()
        picture = dataset.source.load(index)
        spent["decode" if read else "load"] += time.process_time() - start - read
        with seeded_streams(0, index):
            for stage in chain:
                start = time.process_time()
                picture = stage(picture)
                spent[getattr(stage, "__name__", type(stage).__name__)] += time.process_time() - start
        samples.append((picture, 0, index))
        if len(samples) == config.DATA.BATCH_SIZE:
            start = time.process_time()
            collate(samples)
            spent["collate"] += time.process_time() - start
            samples.clear()
    return {stage: seconds / images for stage, seconds in spent.items()}
