"""The GPU rows of docs/PERFORMANCE.md: all variants, precisions and forms, against baselines in the same run."""

from collections.abc import Callable, Sequence

import torch

from tools.bench_candidates import Candidate, Setting, build_network
from tools.bench_models import model_table
from tools.bench_report import Table
from tools.bench_timing import Stopwatch

VARIANTS = ("strip_mlp_tiny", "strip_mlp_tiny_light", "strip_mlp_small", "strip_mlp_base")
BASELINES = ("resnet50", "swin_tiny_patch4_window7_224")
_GPU_PRECISIONS = ("bf16", "tf32", "fp32")  # in the order of interest, should the time run out
_CPU_PRECISIONS = ("bf16", "fp32")


def gpu_tables(
    device: torch.device,
    *,
    variants: Sequence[str] = VARIANTS,
    baselines: Sequence[str] = BASELINES,
    batches: Sequence[int] = (128, 1),
    img_size: int = 224,
    rounds: int = 5,
    compiled: bool = True,
    finished: Callable[[Table], None],
) -> None:
    """Measure every variant in training and inference, each table in one interleaved run with the baselines.

    Args:
        device: the GPU; a CPU works too, without tf32.
        variants: our models, the most interesting first.
        baselines: timm models.
        batches: images a pass, for inference; training takes those above 1.
        img_size: pixels.
        rounds: measurements of each contestant.
        compiled: also measure compiled forms.
        finished: called with each table as soon as it is there, so that nothing is lost when time runs out.
    """
    stopwatch = Stopwatch(device)
    precisions = _GPU_PRECISIONS if device.type == "cuda" else _CPU_PRECISIONS
    settings = [Setting(mode, batch, img_size, device, channels_last=True)
                for batch in batches for mode in ("train", "infer") if not (mode == "train" and batch == 1)]
    for variant in variants:
        folds = hasattr(build_network(variant, img_size), "to_inference")
        for setting in settings:
            forms = _forms(folds and setting.mode == "infer", compiled)
            for precision in precisions:
                torch._dynamo.reset()  # graphs of the tables before are not needed any more
                finished(model_table(
                    [Candidate(variant, form, precision) for form in forms],
                    [Candidate(name, form, precision) for name in baselines for form in _forms(False, compiled)],
                    setting, stopwatch=stopwatch, rounds=rounds, min_seconds=0.5, memory=device.type == "cuda",
                ))


def _forms(inference: bool, compiled: bool) -> list[str]:
    forms = ["eager", "compiled", *(["inference", "inference-compiled"] if inference else [])]
    return [form for form in forms if compiled or not form.endswith("compiled")]
