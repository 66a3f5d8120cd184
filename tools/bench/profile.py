"""Where the time goes: by kind of operation, and by part of the network."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from models import StripMLPNet, accelerate
from tools.bench.candidates import Candidate, Setting, build_network, build_workload
from tools.bench.report import Table

# Operation names that contain a word belong to its group; the first match counts.
_GROUPS = {
    "convolution, 1x1 too": ("conv",),
    "matrix product": ("addmm", "aten::mm", "bmm", "matmul", "gemm", "linear", "attention", "flash"),
    "normalisation": ("norm", "batch_norm"),
    "activation, softmax": ("gelu", "relu", "softmax", "sigmoid"),
    "optimizer": ("adam", "sgd"),
    "copy, layout": ("copy", "cat", "stack", "clone", "contiguous", "permute", "to_copy", "pad", "roll", "memcpy"),
    "sum, product": (
        "add",
        "mul",
        "sub",
        "div",
        "sum",
        "mean",
        "pow",
        "sqrt",
        "where",
        "fill",
        "zero",
        "elementwise",
        "reduce",
        "vectorized",
    ),
}
_OTHER = "other"


def operation_group(name: str) -> str:
    """The group that an operation or kernel belongs to."""
    lowered = name.lower()
    return next((group for group, words in _GROUPS.items() if any(word in lowered for word in words)), _OTHER)


def time_by_group(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of one call in each group of operations: on the CPU by operation, on a GPU by kernel."""
    run()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        micro = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[operation_group(event.key)] += micro * 1e-6
    return dict(seconds)


def group_table(candidates: Sequence[Candidate], setting: Setting) -> Table:
    """Milliseconds of each group of operations for each candidate, one profiled call each."""
    shares = {c.label: time_by_group(build_workload(c, setting).run, setting.device) for c in candidates}
    rows: list[dict[str, Any]] = []
    for group in [*_GROUPS, _OTHER, "sum"]:
        row: dict[str, Any] = {"label": group}
        for label, seconds in shares.items():
            total = sum(seconds.values())
            own = total if group == "sum" else seconds.get(group, 0.0)
            row[label] = f"{1000 * own:.4g} ({100 * own / total:.0f} %)"
            row[f"{label} seconds"] = own
        rows.append(row)
    what = "training step" if setting.mode == "train" else "inference"
    title = (
        f"{what}, batch {setting.batch}: milliseconds of one call by kind of operation, self time "
        "(torch.profiler, which slows down small operations)"
    )
    return Table(title, [("", "label"), *((label, label) for label in shares)], rows)


def part_table(candidates: Sequence[Candidate], setting: Setting, *, repeats: int = 5) -> Table:
    """Milliseconds of each part of our networks in a forward pass in evaluation mode, eager, and its arithmetic.

    Args:
        candidates: of these, ours in eager float32.
        setting: batch, image size and device.
        repeats: passes; the shortest time of each part counts.
    """
    plain = [c for c in candidates if c.name.startswith("strip_mlp") and c.form == "eager" and c.precision == "fp32"]
    measured = {c.label: _times_of_parts(build_network(c.name, setting.img_size), setting, repeats) for c in plain}
    rows: list[dict[str, Any]] = []
    for part in next(iter(measured.values()), {}):
        row: dict[str, Any] = {"label": part}
        for label, parts in measured.items():
            seconds, flops = parts[part]
            total = sum(own for own, _ in parts.values())
            row[label] = f"{1000 * seconds:.4g} ({100 * seconds / total:.0f} %)"
            row[f"{label} rate"] = f"{flops / seconds / 1e9:.3g}" if part != "rest" else None
            row[f"{label} seconds"] = seconds
        rows.append(row)
    columns = [("", "label")]
    for label in measured:
        columns += [(label, label), ("GFLOP/s", f"{label} rate")]
    return Table(f"forward pass in evaluation mode, batch {setting.batch}: milliseconds by part", columns, rows)


def _parts(network: StripMLPNet) -> dict[str, list[nn.Module]]:
    parts = {"patch embedding": [network.patch_embed]}
    for number, stage in enumerate(network.stages, start=1):
        parts[f"stage {number} strip mixing"] = [block.strip_mixing for block in stage]
        parts[f"stage {number} channel mixing"] = [block.channel_mixing for block in stage]
    skips = [network.skip_1_to_3, network.skip_1_to_4, network.skip_2_to_4]
    return {**parts, "merging, skips": [*network.merging, *skips]}


def _times_of_parts(network: StripMLPNet, setting: Setting, repeats: int) -> dict[str, tuple[float, float]]:
    """(Seconds, floating-point operations) of each part; the rest of the network comes last."""
    network = accelerate(network.to(setting.device), setting.device).eval()
    images = torch.randn(setting.batch, 3, setting.img_size, setting.img_size, device=setting.device)
    parts = _parts(network)
    spent: dict[str, list[float]] = {part: [] for part in (*parts, "all")}
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            network(images)
        flops = counter.get_flop_counts()
        operations = {
            part: sum(sum(flops.get(_counter_name(network, m), {}).values()) for m in modules)
            for part, modules in parts.items()
        }
        for _ in range(repeats):
            _timed_pass(network, images, parts, spent)
    seconds = {part: min(times) for part, times in spent.items()}
    result = {part: (seconds[part], operations[part]) for part in parts}
    rest = seconds["all"] - sum(seconds[part] for part in parts), counter.get_total_flops() - sum(operations.values())
    return {**result, "rest": rest}


def _counter_name(network: nn.Module, module: nn.Module) -> str:
    """The name under which FlopCounterMode counts a module."""
    name = next(name for name, other in network.named_modules() if other is module)
    return f"{type(network).__name__}.{name}"


def _timed_pass(
    network: nn.Module, images: torch.Tensor, parts: dict[str, list[nn.Module]], spent: dict[str, list[float]]
) -> None:
    """One forward pass; the seconds in each part, and in all, are appended to ``spent``."""
    sums = dict.fromkeys(parts, 0.0)
    starts: list[float] = []

    def now() -> float:
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter()

    def enter(*_: Any) -> None:
        starts.append(now())

    handles = []
    for part, modules in parts.items():

        def leave(*_: Any, part: str = part) -> None:
            sums[part] += now() - starts.pop()

        for module in modules:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    start = now()
    network(images)
    spent["all"].append(now() - start)
    for part, seconds in sums.items():
        spent[part].append(seconds)
    for handle in handles:
        handle.remove()
