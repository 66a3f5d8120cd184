"""Pictures of the results: the paper's accuracy over measured speed, and where the time goes."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tools.bench_candidates import Candidate, Setting, build_workload
from tools.bench_report import Table

# ImageNet-1K top-1 in percent at 224 x 224, as published; not measured here. Strip-MLP: Cao et al., ICCV 2023 (as in
# the README). Swin: Liu et al., ICCV 2021. ResNet: trained by Wightman et al., 2021 (A1, arXiv 2110.00476).
PUBLISHED = {
    "strip_mlp_tiny_light": ("Strip-MLP-T*", 81.2),
    "strip_mlp_tiny": ("Strip-MLP-T", 82.2),
    "strip_mlp_small": ("Strip-MLP-S", 83.3),
    "strip_mlp_base": ("Strip-MLP-B", 83.6),
    "swin_tiny_patch4_window7_224": ("Swin-T", 81.3),
    "swin_small_patch4_window7_224": ("Swin-S", 83.0),
    "swin_base_patch4_window7_224": ("Swin-B", 83.5),
    "resnet50": ("ResNet-50", 80.4),
}

# Operation names that contain a word belong to its group; the first match counts.
_GROUPS = {
    "convolution, 1x1 too": ("conv",),
    "matrix product": ("addmm", "aten::mm", "bmm", "matmul", "gemm", "linear", "attention", "flash"),
    "normalisation": ("norm", "batch_norm"),
    "activation, softmax": ("gelu", "relu", "softmax", "sigmoid"),
    "optimizer": ("adam", "sgd"),
    "copy, layout": ("copy", "cat", "stack", "clone", "contiguous", "permute", "to_copy", "pad", "roll", "memcpy"),
    "sum, product": ("add", "mul", "sub", "div", "sum", "mean", "pow", "sqrt", "where", "fill", "zero", "elementwise",
                     "reduce", "vectorized"),
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
    title = (f"{what}, batch {setting.batch}: milliseconds of one call by kind of operation, self time "
             "(torch.profiler, which slows down small operations)")
    return Table(title, [("", "label"), *((label, label) for label in shares)], rows)


def plot_groups(table: Table, path: Path) -> None:
    """Draw a ``group_table`` as one bar for each candidate."""
    figure, axes = _figure(1.2 + 0.5 * len(table.columns))
    labels = [heading for heading, _ in table.columns[1:]]
    left = [0.0] * len(labels)
    for row in table.rows[:-1]:
        widths = [1000 * row[f"{label} seconds"] for label in labels]
        axes.barh(labels, widths, left=left, label=row["label"], height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(table.title.replace(" (torch.profiler", "\n(torch.profiler"))
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110)


def plot_accuracy(table: Table, path: Path) -> bool:
    """Draw the published accuracy of the table's models over their measured speed; False if it has none of them."""
    fastest: dict[str, dict[str, Any]] = {}
    for row in table.rows:
        best = fastest.get(row["name"])
        if row["name"] in PUBLISHED and (best is None or row["images_per_second"] > best["images_per_second"]):
            fastest[row["name"]] = row
    if not fastest:
        return False
    figure, axes = _figure(4.2)
    for ours in (True, False):
        rows = [row for name, row in fastest.items() if name.startswith("strip_mlp") == ours]
        points = sorted((row["images_per_second"], PUBLISHED[row["name"]][1]) for row in rows)
        if points:
            axes.plot(*zip(*points, strict=True), "o-" if ours else "s", label="this repository" if ours else "timm")
    for name, row in fastest.items():
        form = "" if row["form"] == "eager" else f" ({row['form']})"
        axes.annotate(PUBLISHED[name][0] + form, (row["images_per_second"], PUBLISHED[name][1]),
                      textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.margins(0.18)
    axes.set_xlabel(f"measured images/s: {table.title}", fontsize=8)
    axes.set_ylabel("ImageNet-1K top-1 (%)\nas the papers report it, not measured here", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return True


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
