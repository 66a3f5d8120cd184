"""The GPU rows of docs/PERFORMANCE.md: all variants, precisions and forms, against baselines in the same run."""

from collections.abc import Callable, Sequence

import torch

from tools.bench.candidates import Candidate, Setting, build_network
from tools.bench.models import model_table
from tools.bench.profile import group_table
from tools.bench.report import Table
from tools.bench.timing import Stopwatch

VARIANTS = ("strip_mlp_tiny", "strip_mlp_tiny_light", "strip_mlp_small", "strip_mlp_base")
BASELINES = ("resnet50", "swin_tiny_patch4_window7_224")
PRECISIONS = ("bf16", "tf32", "fp32")  # in the order of interest, should the time run out


def gpu_tables(
    device: torch.device,
    *,
    variants: Sequence[str] = VARIANTS,
    baselines: Sequence[str] = BASELINES,
    precisions: Sequence[str] = PRECISIONS,
    batches: Sequence[int] = (128, 1),
    img_size: int = 224,
    rounds: int = 5,
    compiled: bool = True,
    finished: Callable[[Table], None],
) -> None:
    """Measure all variants in training and inference; each table is one interleaved run with the baselines.

    After the tables of the first precision comes where the first variant's time goes, by kind of kernel.

    Args:
        device: the GPU; a CPU works too, without tf32.
        variants: our models.
        baselines: timm models.
        precisions: see ``Candidate``.
        batches: images a pass, for inference; training takes those above 1.
        img_size: pixels.
        rounds: measurements of each contestant.
        compiled: also measure compiled forms, and graphed ones for single images.
        finished: called with each table as soon as it is there, so that nothing is lost when time runs out.
    """
    stopwatch = Stopwatch(device)
    folds = all(hasattr(build_network(variant, img_size), "to_inference") for variant in variants)
    settings = [
        Setting(mode, batch, img_size, device, channels_last=True)
        for batch in batches
        for mode in ("train", "infer")
        if not (mode == "train" and batch == 1)
    ]
    for precision in precisions:
        for setting in settings:
            ours, theirs = (
                [
                    Candidate(name, form, precision)
                    for name in names
                    for form in _forms(setting, compiled, folds and names is variants)
                ]
                for names in (variants, baselines)
            )
            torch._dynamo.reset()  # the graphs of the tables before are not needed any more
            finished(
                model_table(
                    ours,
                    theirs,
                    setting,
                    stopwatch=stopwatch,
                    rounds=rounds,
                    min_seconds=0.5,
                    memory=device.type == "cuda",
                )
            )
            if precision == precisions[0]:
                torch._dynamo.reset()
                finished(group_table([c for c in (*ours, *theirs) if c.name in (variants[0], *baselines)], setting))


def _forms(setting: Setting, compiled: bool, folds: bool) -> list[str]:
    """The forms to measure; `folds` says whether the network has an inference form."""
    ways = ["", *(["compiled"] if compiled else []), *(["graphed"] if compiled and setting.batch == 1 else [])]
    forms = [way or "eager" for way in ways]
    if folds and setting.mode == "infer":
        forms += [f"inference-{way}" if way else "inference" for way in ways]
    return forms
