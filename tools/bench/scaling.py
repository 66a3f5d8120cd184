"""Measure an update with several processes on this machine, or calculate one on 8 and 64 GPUs (--predict)."""

import contextlib
import math
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from data import build_batch_transform
from main import accumulate_gradients
from models import accelerate, build_model
from tools.bench.report import ROOT, Report, Table
from tools.bench.timing import Spread, paired_ratio, turns
from utils.config import dump_config, input_shape, load_config, parse_config
from utils.session import Objective
from utils.training import (
    NonFiniteGuard,
    Progress,
    build_criterion,
    build_optimizer,
    build_precision,
    wrap_for_training,
)

NETWORKS = ("tiny_light", "tiny", "small", "base")
CONFIG = "configs/smlp_{}_alpha3_patch4_224_imagenet1k.yaml"
ALONE = "no exchange"  # of gradients: what each process computes by itself
_WARM_UP = 2  # updates
# Strip-MLP-T in bf16, compiled, batch 128, on one H100: 1,075 images/s (docs/PERFORMANCE.md) x 3 x 2 x 3.65e9
ACHIEVED = 23.5  # TFLOP/s


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--cfg", nargs="+", metavar="FILE", help="configurations (default: T; with --predict all four)")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="settings, as main.py takes them")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--accumulate", type=int, default=4, metavar="N", help="micro-batches per update (default: 4)")
    parser.add_argument("--updates", type=int, default=2, metavar="N", help="length of a measurement (default: 2)")
    parser.add_argument("--predict", action="store_true", help="calculate, measure nothing")
    parser.add_argument(
        "--tflops",
        type=float,
        default=ACHIEVED,
        metavar="X",
        help="with --predict: what one GPU reaches in training, 6 x multiply-accumulates per image x images/s / 1e12 "
        "(default: %(default)s, Strip-MLP-T on an H100, see docs/SCALING.md)",
    )


def run(args: Namespace, report: Report) -> None:
    """Report a table for each configuration, or the calculated ones."""
    names = args.cfg or [str(ROOT / CONFIG.format(name)) for name in (NETWORKS if args.predict else NETWORKS[1:2])]
    configs = [load_config(name, args.opts) for name in names]
    if args.predict:
        for table in predicted_tables(configs, args.tflops):
            report.add(table)
        return
    if 1 not in args.processes or min(args.processes) < 1:
        raise ValueError(f"--processes {args.processes}: efficiency is relative to 1, so that has to be among them")
    if args.device.type == "cuda" and max(args.processes) > torch.cuda.device_count():
        raise ValueError(f"--processes {max(args.processes)}, but there are {torch.cuda.device_count()} GPUs")
    for config in configs:
        report.add(measured_table(config, args))


# measured


@dataclass(frozen=True)
class Variant:
    """A way to do an update.

    Attributes:
        label: for the table.
        batches: micro-batches per update.
        compression: ``TRAIN.GRAD_COMPRESSION``.
        exchanges: how often gradients are exchanged: never, once per update, or with every micro-batch.
    """

    label: str
    batches: int = 1
    compression: str = "none"
    exchanges: str = "once"


def variants(world: int, accumulate: int) -> list[Variant]:
    """Return what is measured with ``world`` processes."""
    found = [Variant("one batch"), Variant(f"{accumulate} batches, one exchange", accumulate)]
    if world > 1:
        found += [
            Variant("one batch, bf16 gradients", compression="bf16"),
            Variant(f"one batch, {ALONE}", exchanges="never"),
            Variant(f"{accumulate} batches, {accumulate} exchanges", accumulate, exchanges="each"),
        ]
    return found


class Team:
    """Processes of a group of their own, which do updates when they are asked to and wait otherwise.

    Args:
        world: their number.
        config: of the network and its update.
        device: ``cpu``, or ``cuda`` for one GPU each.
        threads: of each process.
    """

    def __init__(self, world: int, config: CfgNode, *, device: torch.device, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._processes, self._pipes = [], []
        context = mp.get_context("spawn")
        for rank in range(world):
            own, theirs = context.Pipe()
            place = f"file://{self._folder.name}/store"
            words = (rank, world, place, dump_config(config), device.type, threads, theirs)
            process = context.Process(target=_work, args=words, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(own)

    def seconds(self, variant: Variant, updates: int) -> float:
        """Return the seconds per update of the slowest process."""
        for pipe in self._pipes:
            pipe.send((variant, updates))
        try:
            return max(pipe.recv() for pipe in self._pipes)
        except EOFError as error:
            raise ValueError("a process has ended; its error is above") from error

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def _work(rank: int, world: int, store: str, config: str, device: str, threads: int, pipe: Connection) -> None:
    """Do updates for a ``Team`` until its end of ``pipe`` is closed."""
    torch.set_num_threads(threads)
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    known: dict[str, Callable[[Variant], None]] = {}
    config = parse_config(config, "the benchmark's configuration")
    with contextlib.suppress(EOFError):
        while True:
            variant, updates = pipe.recv()
            if variant.compression not in known:
                known[variant.compression] = build_update(config, variant.compression, place, rank)
            update = known[variant.compression]
            for _ in range(_WARM_UP if updates == 0 else 0):
                update(variant)
            dist.barrier()
            start = time.perf_counter()
            for _ in range(updates):
                update(variant)
            if device == "cuda":
                torch.cuda.synchronize()
            pipe.send((time.perf_counter() - start) / max(1, updates))
    dist.destroy_process_group()


def build_update(config: CfgNode, compression: str, device: torch.device, rank: int) -> Callable[[Variant], None]:
    """Return a function that does an update as ``main.py`` does it, on random images. Collective."""
    classes = config.MODEL.NUM_CLASSES or 1000
    model = accelerate(build_model(config, classes).to(device), device, lean=config.TRAIN.LEAN)
    ddp_model = wrap_for_training(model, device, grad_compression=compression)
    optimizer, precision = build_optimizer(config, model, config.TRAIN.BASE_LR), build_precision(config, device)
    transform = build_batch_transform(config, is_train=True, device=device, rank=rank, num_classes=classes)
    criterion = build_criterion(config, soft_targets=transform.mixes).to(device)
    objective = Objective(config=config, precision=precision, transform=transform, criterion=criterion)
    guard, progress = NonFiniteGuard(model, device, config.TRAIN.MAX_NONFINITE), Progress()
    shape = (config.DATA.BATCH_SIZE, *input_shape(config))
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
    indices = torch.arange(len(images))
    ddp_model.train()
    no_sync = ddp_model.no_sync

    def update(variant: Variant) -> None:
        guard.begin({})
        ddp_model.no_sync = contextlib.nullcontext if variant.exchanges == "each" else no_sync
        alone: AbstractContextManager = no_sync() if variant.exchanges == "never" else contextlib.nullcontext()
        with alone:
            group = [(images, indices % classes, indices)] * variant.batches
            loss = accumulate_gradients(ddp_model, group, progress, objective)
        precision.scaler.unscale_(optimizer)
        norm = clip_grad_norm_(ddp_model.parameters(), config.TRAIN.CLIP_GRAD or math.inf)
        guard.step_unless_nonfinite(optimizer, precision.scaler, norm, loss)
        optimizer.zero_grad()
        progress.global_step += 1

    return update


def measured_table(config: CfgNode, args: Namespace) -> Table:
    """Measure all variants with all numbers of processes, in turns."""
    teams = {
        world: Team(world, config, device=args.device, threads=torch.get_num_threads()) for world in args.processes
    }
    cases = {(world, v.label): v for world in args.processes for v in variants(world, args.accumulate)}
    times: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    try:
        for (world, _), variant in cases.items():
            teams[world].seconds(variant, 0)
        for world, label in turns(list(cases), args.rounds):
            times[world, label].append(teams[world].seconds(cases[world, label], args.updates))
    finally:
        for team in teams.values():
            team.close()
    rows = [_row(world, variant, times, config.DATA.BATCH_SIZE) for (world, _), variant in cases.items()]
    columns = [
        ("", "label"),
        ("processes", "processes"),
        ("ms", "milliseconds"),
        ("images/s", "images_per_second"),
        ("efficiency", "efficiency"),
        ("exchange, share of the time", "exchange"),
    ]
    size = "x".join(map(str, input_shape(config)[1:]))
    title = (
        f"{config.MODEL.NAME}, update of {config.DATA.BATCH_SIZE} images of {size} per process and batch, "
        f"{torch.get_num_threads()} thread(s) per process, wall time, {args.rounds} rounds in turns of {args.updates} "
        "update(s); efficiency: images/s of N processes / (N x images/s of one)"
    )
    return Table(title, columns, rows)


def _row(world: int, variant: Variant, times: dict[tuple[int, str], list[float]], batch: int) -> dict:
    """Return a row; ratios are those of the rounds."""
    own, images = times[world, variant.label], world * variant.batches * batch
    single = times[1, next(v.label for v in variants(1, variant.batches) if v.batches == variant.batches)]
    row = {
        "label": variant.label,
        "processes": world,
        "milliseconds": str(Spread.of([1000 * seconds for seconds in own])),
        "images_per_second": Spread.of([images / seconds for seconds in own]).median,
        "seconds": own,
    }
    if world > 1 and variant.exchanges != "never":
        row["efficiency"] = str(paired_ratio(own, single))
    if world > 1 and variant.exchanges == "once" and variant.batches == 1:
        alone = times[world, f"one batch, {ALONE}"]
        row["exchange"] = str(Spread.of([1 - other / mine for mine, other in zip(own, alone, strict=True)]))
    return row


# calculated

BUCKET = 25 * 2**20  # bytes; DDP exchanges gradients in buckets of this size, while the backward pass goes on
BACKWARD = 2 / 3  # of an update's computing


@dataclass(frozen=True)
class Cluster:
    """GPUs in a ring.

    Attributes:
        name: for the table.
        gpus: their number.
        bandwidth: bytes per second in one direction over the slowest place of the ring.
        latency: seconds per step of the ring (assumed).
    """

    name: str
    gpus: int
    bandwidth: float
    latency: float


# Bandwidths in one direction, from NVIDIA's data sheets of the H100 (NVLink 4: 900 GB/s in both; PCIe 5.0 x16: 128 GB/s
# in both) and of the DGX H100 (8 x 400 Gb/s). A network card that the GPUs of a machine share carries one ring.
CLUSTERS = (
    Cluster("8 GPUs, NVLink 4", 8, 450e9, 3e-6),
    Cluster("8 GPUs, PCIe 5.0 x16", 8, 64e9, 5e-6),
    Cluster("64 GPUs, 8 machines, 100 Gb/s each", 64, 12.5e9, 10e-6),
    Cluster("64 GPUs, 8 machines, 200 Gb/s each", 64, 25e9, 10e-6),
    Cluster("64 GPUs, 8 machines, 400 Gb/s each", 64, 50e9, 10e-6),
    Cluster("64 GPUs, 8 machines, 8 x 400 Gb/s each", 64, 400e9, 10e-6),
)
LOADER = {"cores": 241, "cores_fast_resize": 308}  # images/s per core, docs/PERFORMANCE.md


def all_reduce_seconds(nbytes: float, cluster: Cluster) -> float:
    """Return how long a ring all-reduce of ``nbytes`` takes: 2 (N - 1) steps with a share of 1 / N each.

    Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
    """
    steps = 2 * (cluster.gpus - 1)
    return steps * (nbytes / cluster.gpus / cluster.bandwidth + cluster.latency)


@dataclass(frozen=True)
class Prediction:
    """A calculated update.

    Attributes:
        computing: seconds without any exchange.
        exchange: seconds that the exchange of gradients takes by itself.
        exposed: seconds by which it makes the update longer, if as much as possible happens during the backward pass.
    """

    computing: float
    exchange: float
    exposed: float

    @property
    def efficiency(self) -> float:
        """Images/s over those without exchange, at best."""
        return self.computing / (self.computing + self.exposed)

    @property
    def worst_efficiency(self) -> float:
        """The same if nothing happens during the backward pass."""
        return self.computing / (self.computing + self.exchange)


def predict(
    parameters: int, macs: float, cluster: Cluster, *, batch: int, tflops: float = ACHIEVED, gradient_bytes: int = 4
) -> Prediction:
    """Calculate an update.

    Args:
        parameters: of the network, all trained.
        macs: multiply-accumulates of a forward pass per image; an update computes three times as much.
        cluster: GPUs and their slowest link.
        batch: images per GPU.
        tflops: what a GPU reaches in training.
        gradient_bytes: per parameter; 2 with ``TRAIN.GRAD_COMPRESSION bf16``.
    """
    computing = batch * 6 * macs / (tflops * 1e12)
    nbytes = parameters * gradient_bytes
    buckets = math.ceil(parameters * 4 / BUCKET)
    one = all_reduce_seconds(nbytes / buckets, cluster)
    # the last bucket is complete when the backward pass ends
    exposed = max(buckets * one - BACKWARD * computing, one)
    return Prediction(computing, buckets * one, exposed)


def size(config: CfgNode) -> tuple[int, float]:
    """Return (parameters, multiply-accumulates per image) of the network, counted without computing anything."""
    with torch.device("meta"):
        model = build_model(config, config.MODEL.NUM_CLASSES or 1000).eval()
        image = torch.empty(1, *input_shape(config))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2


def predicted_tables(configs: Sequence[CfgNode], tflops: float) -> list[Table]:
    """Return a table for each cluster, and one of the cores that loading takes."""
    sizes = {Path(config.MODEL.NAME).name.split("_alpha")[0]: (*size(config), config) for config in configs}
    tables = []
    for cluster in CLUSTERS:
        rows = []
        for name, (parameters, macs, config) in sizes.items():
            for nbytes, label in ((4, "float32"), (2, "bf16")):
                batch = config.DATA.BATCH_SIZE
                found = predict(parameters, macs, cluster, batch=batch, tflops=tflops, gradient_bytes=nbytes)
                rows.append(_predicted_row(f"{name}, {label}", found, cluster, batch))
        title = (
            f"CALCULATED, not measured: {cluster.name}, {configs[0].DATA.BATCH_SIZE} images per GPU, {tflops} TFLOP/s"
        )
        tables.append(Table(title, _PREDICTED, rows))
    rows = []
    for name, (_, macs, _) in sizes.items():
        rate = tflops * 1e12 / (6 * macs)
        cores = {key: f"{rate / images:.1f}" for key, images in LOADER.items()}
        rows.append({"label": name, "images_per_second": rate, **cores})
    columns = [("", "label"), ("images/s per GPU", "images_per_second"), ("cores per GPU, default", "cores")]
    columns += [("with DATA.FAST_RESIZE", "cores_fast_resize")]
    tables.append(Table("CALCULATED, not measured: cores that load the images of one GPU", columns, rows))
    return tables


_PREDICTED = [
    ("gradients", "label"),
    ("computing, ms", "computing"),
    ("exchange, ms", "exchange"),
    ("update, ms", "update"),
    ("efficiency", "efficiency"),
    ("images/s", "images_per_second"),
]


def _predicted_row(label: str, found: Prediction, cluster: Cluster, batch: int) -> dict:
    update = found.computing + found.exposed
    return {
        "label": label,
        "computing": 1000 * found.computing,
        "exchange": 1000 * found.exchange,
        "update": 1000 * update,
        "efficiency": f"{found.worst_efficiency:.2f} - {found.efficiency:.2f}",
        "images_per_second": cluster.gpus * batch / update,
    }
