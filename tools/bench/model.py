"""Compare models: time of an update or of a forward pass, and memory."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from tools.bench.candidates import PRECISIONS, Candidate, Setting, build_workload
from tools.bench.memory import gpu_peak, resident_growth
from tools.bench.report import Report, Table
from tools.bench.timing import Spread, Stopwatch, measure_paired, paired_ratio

MIB = 2**20


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="NAME[:FORM][:PRECISION], see benchmark.py --help")
    parser.add_argument("--vs", nargs="+", default=[], metavar="MODEL", help="baselines, for the ratios")
    parser.add_argument("--mode", nargs="+", default=["infer"], choices=("train", "infer"), help="default: infer")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=PRECISIONS, help="default: fp32")
    parser.add_argument("--batch", nargs="+", type=int, default=[16], metavar="N", help="default: 16")
    parser.add_argument("--img-size", type=int, default=224, metavar="PIXELS", help="default: 224")
    parser.add_argument("--channels-last", action="store_true", help="channels_last images and timm weights")
    parser.add_argument("--memory", action="store_true", help="also measure memory (on a CPU in fresh processes)")
    parser.add_argument(
        "--min-seconds", type=float, default=0.5, metavar="S", help="length of one measurement (default: 0.5)"
    )


def run(args: Namespace, report: Report) -> None:
    """Report a table for each precision, mode and batch."""
    for precision in args.precision:
        candidates, baselines = (
            [Candidate.parse(text, precision=precision) for text in texts] for texts in (args.models, args.vs)
        )
        for mode in args.mode:
            for batch in args.batch:
                setting = Setting(mode, batch, args.img_size, args.device, args.channels_last)
                report.add(
                    model_table(
                        candidates,
                        baselines,
                        setting,
                        rounds=args.rounds,
                        min_seconds=args.min_seconds,
                        memory=args.memory,
                    )
                )


def model_table(
    candidates: Sequence[Candidate],
    baselines: Sequence[Candidate],
    setting: Setting,
    *,
    rounds: int,
    min_seconds: float,
    memory: bool = False,
) -> Table:
    """Measure candidates and baselines in one setting, in turns.

    Args:
        candidates: the networks of interest.
        baselines: what they are compared with; measured in the same way.
        setting: mode, batch, image size, device.
        rounds, min_seconds: number and length of the measurements of each network.
        memory: also measure memory, in MiB: on a GPU the peak of what is allocated for weights, optimizer and one call,
            on a CPU the growth of a fresh process over two calls.
    """
    networks = list(dict.fromkeys([*candidates, *baselines]))
    runs, peaks = {}, {}
    for network in tqdm(networks, desc="build and measure memory" if memory else "build", leave=False):
        before = torch.cuda.memory_allocated() if setting.device.type == "cuda" else 0
        runs[network.label] = build_workload(network, setting).run
        if memory and setting.device.type == "cuda":
            peaks[network.label] = gpu_peak(runs[network.label], before)
        elif memory:
            peaks[network.label] = resident_growth(network, setting)
    stopwatch = Stopwatch(setting.device)
    times = measure_paired(runs, stopwatch, rounds=rounds, min_seconds=min_seconds)
    rows = [_row(network, times, baselines, setting, peaks.get(network.label)) for network in networks]
    columns = [
        ("", "label"),
        ("images/s", "images_per_second"),
        ("min - max", "range"),
        ("ms", "milliseconds"),
        *((f"x {b.label}", f"ratio {b.label}") for b in baselines),
        *([("peak MiB" if setting.device.type == "cuda" else "growth MiB", "memory_mib")] if memory else []),
    ]
    settings = {"mode": setting.mode, "batch": setting.batch, "img_size": setting.img_size}
    return Table(_title(setting, stopwatch, rounds), columns, rows, settings)


def _row(
    network: Candidate,
    times: dict[str, list[float]],
    baselines: Sequence[Candidate],
    setting: Setting,
    peak: int | None,
) -> dict[str, Any]:
    own = times[network.label]
    rate = Spread.of([setting.batch / seconds for seconds in own])
    row = {
        "label": network.label,
        "name": network.name,
        "form": network.form,
        "precision": network.precision,
        "images_per_second": rate.median,
        "range": rate.range,
        "milliseconds": 1000 * Spread.of(own).median,
        "seconds": own,
        "memory_mib": None if peak is None else round(peak / MIB),
    }
    for baseline in baselines:
        if baseline != network:
            row[f"ratio {baseline.label}"] = str(paired_ratio(own, times[baseline.label]))
    return row


def _title(setting: Setting, stopwatch: Stopwatch, rounds: int) -> str:
    what = "training update" if setting.mode == "train" else "inference"
    order = "channels_last" if setting.channels_last else "contiguous"
    return (
        f"{what}, batch {setting.batch}, {setting.img_size} x {setting.img_size}, {order} images, fp32 unless "
        f"noted, {torch.get_num_threads()} thread(s), {stopwatch.clock}, {rounds} rounds in turns"
    )
