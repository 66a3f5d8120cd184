"""Measure speed and memory of models, the speed of the data loader, the start of a run, and several processes.

    python tools/benchmark.py model strip_mlp_tiny --mode train --batch 16 --vs reference resnet50
    python tools/benchmark.py model strip_mlp_tiny:inference --batch 1 16 --vs reference resnet50
    python tools/benchmark.py count strip_mlp_tiny reference resnet50 --precision bf16 --by operation
    python tools/benchmark.py loader --data-path <folder>
    python tools/benchmark.py loader --small
    python tools/benchmark.py startup
    python tools/benchmark.py gpu --json gpu.json
    python tools/benchmark.py scaling --processes 1 2 --threads 1
    python tools/benchmark.py scaling --predict

A model is NAME[:FORM][:PRECISION]. NAME: any timm model, or `reference` for the plain published formulation. FORM: none
(as main.py trains it on this device), plain, lean, compiled, graphed (CUDA graph), inference, inference-compiled or
inference-graphed. PRECISION: fp32, tf32, bf16 or fp16. All models of a table take turns in one process; a ratio is the
median over the rounds (smallest - largest). What a number depends on is printed above the tables.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a file, Python looks in tools/ only

import torch

from tools.bench import count, gpu, loader, model, scaling, startup
from tools.bench.report import Report

COMMANDS = {"model": model, "count": count, "loader": loader, "startup": startup, "gpu": gpu, "scaling": scaling}


def device_name(text: str) -> torch.device:
    """Return the device that a flag names; ``main`` looks whether it is there."""
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; name cpu or cuda") from error


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line: one subcommand per module, with the arguments common to all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.__doc__, description=module.__doc__)
        command.add_argument(
            "--rounds", type=int, default=5, metavar="N", help="measurements of each candidate (default: 5)"
        )
        command.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch")
        command.add_argument("--device", type=device_name, default=device, help="cpu or cuda (default: %(default)s)")
        command.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = args.device.type == "cuda"
    try:
        if args.device.type == "cuda" and args.command != "count" and not torch.cuda.is_available():
            raise ValueError("PyTorch sees no GPU; on a CPU use: tools/benchmark.py model")
        COMMANDS[args.command].run(
            args, Report(torch.device("cpu") if args.command == "count" else args.device, args.json)
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
