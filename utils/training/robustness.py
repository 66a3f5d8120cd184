"""Corruption robustness as ImageNet-C defines it.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Mean top-1 error of AlexNet over the five severities, as a share. Source: ALEXNET_ERR in imagenet.py of
# github.com/google-research/augmix, which names the paper's repository, github.com/hendrycks/robustness, as its source.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = (1, 2, 3, 4, 5)


def check_corruption_folders(root: str | Path) -> None:
    """Raise a FileNotFoundError that lists every CORRUPTION/SEVERITY that ``root`` lacks."""
    folders = [Path(root) / name / str(severity) for name in ALEXNET_ERRORS for severity in SEVERITIES]
    missing = [str(folder.relative_to(root)) for folder in folders if not folder.is_dir()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"TEST.CORRUPTIONS: {root} lacks {len(missing)} of the {len(folders)} folders CORRUPTION/SEVERITY: {shown}"
        )


def corruption_summary(errors: Mapping[str, list[float]], *, normalise: bool) -> dict[str, Any]:
    """Return the errors of each corruption and their means, in percent.

    Args:
        errors: top-1 errors in percent, by corruption, in the order of ``SEVERITIES``.
        normalise: divide each corruption's error by AlexNet's, which is for the 1000 classes of ImageNet.

    Returns:
        ``corruptions``: by name, ``errors``, their mean ``error`` and ``ce``, the error in percent of AlexNet's (None
        unless ``normalise``); ``mean_error`` and ``mce``, the means of both over the corruptions.
    """
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    ces = {name: mean / ALEXNET_ERRORS[name] if normalise else None for name, mean in means.items()}
    return {
        "corruptions": {
            name: {"errors": list(values), "error": means[name], "ce": ces[name]} for name, values in errors.items()
        },
        "mean_error": sum(means.values()) / len(means),
        "mce": sum(ces.values()) / len(ces) if normalise else None,
    }


def corruption_table(summary: Mapping[str, Any]) -> str:
    """Return a summary of ``corruption_summary`` as a table of text."""

    def line(name: str, cells: list[Any], error: float, ce: float | None) -> str:
        numbers = [f"{cell:>7}" if isinstance(cell, (str, int)) else f"{cell:7.2f}" for cell in cells]
        return f"{name:<18}{''.join(numbers)}{error:>8.2f}{'' if ce is None else f'{ce:>8.2f}'}"

    rows = [line(name, row["errors"], row["error"], row["ce"]) for name, row in summary["corruptions"].items()]
    head = f"{'error in %':<18}{''.join(f'{severity:>7}' for severity in SEVERITIES)}{'mean':>8}"
    normalised = summary["mce"] is not None
    last = line("mean", [""] * len(SEVERITIES), summary["mean_error"], summary["mce"])
    return "\n".join([head + ("      CE" if normalised else ""), *rows, last])
