"""Measure speed: of models, of the loader, of the whole loop; on a GPU, everything that docs/PERFORMANCE.md asks for.

    python tools/benchmark.py model strip_mlp_tiny --mode train --batch 16 --vs reference resnet50
    python tools/benchmark.py model strip_mlp_tiny:inference --batch 1 16 --vs reference resnet50 --plot plots
    python tools/benchmark.py loader --data-path <folder>
    python tools/benchmark.py end-to-end --data-path <folder> --updates 10
    python tools/benchmark.py startup
    python tools/benchmark.py gpu --json gpu.json

A model is NAME[:FORM][:PRECISION]: any timm model, or `reference` for the plain formulation of the published
description; eager, compiled, graphed (CUDA graph), inference, inference-compiled or inference-graphed; fp32, tf32, bf16
or fp16. All contestants of a table take turns in one process; a ratio is the median over the rounds (smallest -
largest). What a number depends on is printed above the tables.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, Python looks in tools/ alone

import torch

from tools.bench.candidates import PRECISIONS, Candidate, Setting
from tools.bench.gpu import BASELINES, VARIANTS, gpu_tables
from tools.bench.gpu import PRECISIONS as GPU_PRECISIONS
from tools.bench.loader import CONFIG, loader_table, pipeline_configs, stage_table
from tools.bench.loop import end_to_end_table, startup_table
from tools.bench.models import model_table
from tools.bench.plots import plot_accuracy, plot_shares
from tools.bench.profile import group_table, part_table
from tools.bench.report import ROOT, Table, environment, print_environment, write_json
from tools.bench.timing import Stopwatch


class Report:
    """Prints tables as they come and keeps them for the JSON file, which is written anew after each."""

    def __init__(self, device: torch.device, json_file: Path | None) -> None:
        self.facts = environment(device)
        self._json_file = json_file
        self._tables: list[Table] = []
        print_environment(self.facts)

    def add(self, table: Table) -> None:
        """Print ``table`` and write the file."""
        self._tables.append(table)
        print(table.text(), flush=True)
        if self._json_file is not None:
            write_json(self._json_file, self.facts, self._tables)


def run_models(args: argparse.Namespace, report: Report) -> None:
    """Tables of the models asked for, one for each mode, batch and precision."""
    for precision in args.precision:
        candidates = [Candidate.parse(text, precision=precision) for text in args.models]
        baselines = [Candidate.parse(text, precision=precision) for text in args.vs]
        for mode in args.mode:
            for batch in args.batch:
                setting = Setting(mode, batch, args.img_size, args.device, args.channels_last)
                table = model_table(
                    candidates,
                    baselines,
                    setting,
                    stopwatch=Stopwatch(args.device, args.clock),
                    rounds=args.rounds,
                    min_seconds=args.min_seconds,
                    memory=args.memory,
                )
                report.add(table)
                if args.plot is not None:
                    _plot(table, [*candidates, *baselines], setting, args.plot, report)


def _plot(table: Table, contestants: Sequence[Candidate], setting: Setting, folder: Path, report: Report) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{setting.mode}_batch{setting.batch}_{contestants[0].precision}"
    if plot_accuracy(table, folder / f"accuracy_{stem}.png"):
        print(f"drawn: {folder / f'accuracy_{stem}.png'}")
    tables = {"operations": group_table(contestants, setting), "parts": part_table(contestants, setting)}
    for kind, shares in tables.items():
        if shares.rows:
            report.add(shares)
            plot_shares(shares, folder / f"{kind}_{stem}.png")
            print(f"drawn: {folder / f'{kind}_{stem}.png'}")


def run_loader(args: argparse.Namespace, report: Report) -> None:
    """Tables of the loader, for training and evaluation."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for train in (True, False):
            configs = pipeline_configs(
                args.data_path, train=train, batch=args.batch, workers=args.workers, folder=Path(folder), cfg=args.cfg
            )
            report.add(loader_table(configs, train=train, rounds=args.rounds, device=args.device))
            report.add(stage_table(configs, train=train, images=args.images))


def run_end_to_end(args: argparse.Namespace, report: Report) -> None:
    """Table of the training loop against its parts."""
    logging.disable(logging.INFO)  # of the run; warnings stay
    overrides = {"DATA.DATA_PATH": args.data_path, "DATA.BATCH_SIZE": args.batch, "DATA.NUM_WORKERS": args.workers}
    report.add(end_to_end_table(args.cfg, overrides, args.opts, updates=args.updates, rounds=args.rounds))


def run_startup(args: argparse.Namespace, report: Report) -> None:
    """Table of the time to the first update."""
    report.add(startup_table(args.rounds))


def run_gpu(args: argparse.Namespace, report: Report) -> None:
    """All GPU tables."""
    if args.device.type != "cuda":
        raise ValueError("no GPU is visible; on a CPU use: tools/benchmark.py model")
    gpu_tables(
        args.device,
        variants=args.variants,
        baselines=args.vs,
        precisions=args.precision,
        batches=args.batch,
        rounds=args.rounds,
        compiled=not args.no_compile,
        finished=report.add,
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rounds", type=int, default=5, help="measurements of each contestant (default 5)")
    common.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    common.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    commands = parser.add_subparsers(dest="command", required=True)

    model = commands.add_parser("model", parents=[common], help="training step and inference of models")
    model.add_argument("models", nargs="+", metavar="MODEL", help="NAME[:FORM][:PRECISION]")
    model.add_argument("--vs", nargs="+", default=[], metavar="MODEL", help="baselines, for the ratios")
    model.add_argument("--mode", nargs="+", default=["infer"], choices=("train", "infer"))
    model.add_argument("--precision", nargs="+", default=["fp32"], choices=PRECISIONS)
    model.add_argument("--batch", nargs="+", type=int, default=[16])
    model.add_argument("--img-size", type=int, default=224)
    model.add_argument("--channels-last", action="store_true", help="channels_last images and timm weights")
    model.add_argument("--memory", action="store_true", help="measure memory too (on a CPU in fresh processes)")
    model.add_argument("--clock", default="auto", choices=("auto", "wall", "cpu"))
    model.add_argument("--min-seconds", type=float, default=0.5, help="length of one measurement (default 0.5)")
    model.add_argument("--plot", type=Path, metavar="DIR", help="profile, and draw pictures there")
    model.set_defaults(run=run_models)

    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data-path", default="", metavar="DIR", help="image folder with train/ and val/")
    data.add_argument("--cfg", type=Path, default=ROOT / CONFIG, help="config (default: tiny on ImageNet)")
    data.add_argument("--batch", type=int, default=32)
    loader = commands.add_parser("loader", parents=[common, data], help="data pipelines")
    loader.add_argument("--workers", type=int, default=0, help="loader processes (default 0: all in this one)")
    loader.add_argument("--images", type=int, default=200, help="images for the shares of the stages")
    loader.set_defaults(run=run_loader)
    loop = commands.add_parser("end-to-end", parents=[common, data], help="the training loop against its parts")
    loop.add_argument("--workers", type=int, default=-1, help="loader processes (default: as main.py)")
    loop.add_argument("--updates", type=int, default=10, help="updates a measurement")
    loop.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE")
    loop.set_defaults(run=run_end_to_end)
    commands.add_parser("startup", parents=[common], help="time to the first update").set_defaults(run=run_startup)

    gpu = commands.add_parser("gpu", parents=[common], help="everything that a GPU is asked for")
    gpu.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="MODEL")
    gpu.add_argument("--vs", nargs="+", default=list(BASELINES), metavar="MODEL")
    gpu.add_argument("--precision", nargs="+", default=list(GPU_PRECISIONS), choices=PRECISIONS)
    gpu.add_argument("--batch", nargs="+", type=int, default=[128, 1])
    gpu.add_argument("--no-compile", action="store_true", help="leave out the compiled forms, which take minutes")
    gpu.set_defaults(run=run_gpu)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = args.device.type == "cuda"
    try:
        args.run(args, Report(args.device, args.json))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
