"""The dump that a diverged run leaves behind: everything that its last update depended on.

``tools/replay.py`` reads it and repeats that update.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.checkpoint.capture import capture
from utils.checkpoint.files import write_checkpoint
from utils.runtime import gather_objects, on_main_process
from utils.training import TrainState


def write_dump(state: TrainState, metadata: dict[str, Any], directory: Path, sample_name: Callable[[int], str]) -> Path:
    """Write ``nonfinite_step_N.pth`` and return its path. Collective.

    The weights and the optimizer are those that the update met, because a skipped update changes nothing. Each process
    adds its random streams, the indices and names of its samples, its loss, and the gradient norm.

    Args:
        state: the live state, right after a skipped update.
        metadata: plain entries of the checkpoints (config text, class names).
        directory: output folder.
        sample_name: index -> path or name, of the training set.

    Raises:
        CheckpointError: rank 0 could not write; on all processes.
    """
    record = dict(state.guard.history[-1])
    record["loss"], record["grad_norm"] = float(record["loss"]), float(record["grad_norm"])
    record["names"] = [[sample_name(int(i)) for i in micro] for micro in record["indices"]]
    records = gather_objects(record)
    payload = {**capture(state, metadata), "update": records}
    path = directory / f"nonfinite_step_{record['step']:09d}.pth"
    on_main_process(lambda: write_checkpoint(path, payload))
    return path
