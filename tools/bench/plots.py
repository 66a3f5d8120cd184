"""Pictures of the results: the paper's accuracy over measured speed, and where the time goes."""

from pathlib import Path
from typing import Any

from tools.bench.report import Table

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


def plot_shares(table: Table, path: Path) -> None:
    """Draw a table of ``tools.bench.profile`` as one bar for each candidate."""
    from matplotlib import colormaps

    labels = [key for _, key in table.columns if f"{key} seconds" in table.rows[0]]
    figure, axes = _figure(1.7 + 0.5 * len(labels))
    axes.set_prop_cycle(color=colormaps["tab20"].colors)
    left = [0.0] * len(labels)
    for row in table.rows:
        if row["label"] == "sum":
            continue
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
        axes.annotate(
            PUBLISHED[name][0] + form,
            (row["images_per_second"], PUBLISHED[name][1]),
            textcoords="offset points",
            xytext=(6, 6),
            fontsize=8,
        )
    axes.margins(0.3, 0.18)  # room for the names
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
