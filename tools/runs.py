"""Finished runs, as their output folders hold them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from tools.predictions import Predictions, read_predictions
from utils.config import parse_config
from utils.runtime import printable
from utils.training import metrics_rows


@dataclass(frozen=True)
class FinishedRun:
    """What a run has left behind: ``predictions`` is None where no report was made."""

    name: str
    config: CfgNode
    rows: list[dict[str, Any]]
    predictions: Predictions | None


def read_run(folder: Path, name: str) -> FinishedRun:
    """Read the output folder of a run; nothing in it is changed.

    Raises:
        ValueError, OSError: there is no run, or a file cannot be read.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is not the output folder of a run: it has no config.yaml or no metrics.jsonl")
    stored = [path for path in (folder / "predictions.npz", folder / "report" / "predictions.npz") if path.is_file()]
    try:
        rows = metrics_rows(folder / "metrics.jsonl")
    except ValueError as error:
        raise ValueError(f"{folder / 'metrics.jsonl'} cannot be read: {error}") from error
    return FinishedRun(
        printable(name),
        parse_config((folder / "config.yaml").read_text(encoding="utf-8"), str(folder / "config.yaml")),
        rows,
        read_predictions(stored[0]) if stored else None,
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths by which they differ."""
    parts = [folder.resolve().parts for folder in folders]
    length = next((n for n in range(1, max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts)), None)
    if length is None:
        raise ValueError("the same run is named twice")
    return ["/".join(p[-length:]) for p in parts]
