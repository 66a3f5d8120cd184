"""Measure what docs/PERFORMANCE.md asks of a GPU: all variants, precisions and forms beside baselines."""

from argparse import ArgumentParser, Namespace

import torch

from tools.bench.candidates import PRECISIONS, Candidate, Setting
from tools.bench.model import model_table
from tools.bench.report import Report

VARIANTS = ("strip_mlp_tiny", "strip_mlp_tiny_light", "strip_mlp_small", "strip_mlp_base")
BASELINES = ("resnet50", "swin_tiny_patch4_window7_224")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.set_defaults(device=torch.device("cuda"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="MODEL")
    parser.add_argument("--vs", nargs="+", default=list(BASELINES), metavar="MODEL", help="timm models")
    parser.add_argument("--precision", nargs="+", default=["bf16", "tf32", "fp32"], choices=PRECISIONS)
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[128, 1], metavar="N", help="default: 128 1; 1 is inference only"
    )
    parser.add_argument("--img-size", type=int, default=224, metavar="PIXELS", help="default: 224")
    parser.add_argument("--min-seconds", type=float, default=0.5, metavar="S", help="length of one measurement")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled forms, which take minutes")


def run(args: Namespace, report: Report) -> None:
    """Report a table for each precision, batch and mode, the most interesting ones first, in case time runs out."""
    for precision in args.precision:
        for batch in args.batch:
            for mode in ("train", "infer") if batch > 1 else ("infer",):
                setting = Setting(mode, batch, args.img_size, args.device, channels_last=True)
                ours, theirs = (
                    [
                        Candidate.parse(f"{name}:{form}", precision=precision)
                        for name in names
                        for form in _forms(setting, compiled=not args.no_compile, ours=names is args.variants)
                    ]
                    for names in (args.variants, args.vs)
                )
                if not args.no_compile:
                    torch._dynamo.reset()  # the graphs of earlier tables are no longer needed
                report.add(
                    model_table(
                        ours,
                        theirs,
                        setting,
                        rounds=args.rounds,
                        min_seconds=args.min_seconds,
                        memory=args.device.type == "cuda",
                    )
                )


def _forms(setting: Setting, *, compiled: bool, ours: bool) -> list[str]:
    ways = ["", *(["compiled"] if compiled else []), *(["graphed"] if compiled and setting.batch == 1 else [])]
    forms = [way or "default" for way in ways]
    if ours and setting.mode == "infer":
        forms += [f"inference-{way}" if way else "inference" for way in ways]
    return forms
