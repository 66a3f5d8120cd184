"""A run small enough for tests: a few generated images, a very small network, a few updates."""

import json
from pathlib import Path
from typing import Any

import main
import main_eval
from tests.builders import TINY_MODEL
from tests.images import write_splits

CONFIG = f"""
DATA: {{DATASET: imagenet, IMG_SIZE: 32, BATCH_SIZE: 4, NUM_WORKERS: 0, INTERPOLATION: bilinear}}
MODEL: {TINY_MODEL}
TRAIN: {{EPOCHS: 2, WARMUP_EPOCHS: 0, BASE_LR: 1e-3}}
AUG: {{AUTO_AUGMENT: none, COLOR_JITTER: 0.0}}
SAVE_FREQ: 2
PRINT_FREQ: 2
"""


class TinyRun:
    """Folders, config and command line of a tiny run; 24 training and 9 validation images in three classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cfg = folder / "tiny.yaml"
        self.cfg.write_text(CONFIG)
        self.data = write_splits(folder / "data", train=8, val=3)
        self.output = folder / "output"

    def argv(self, *words: Any, tag: str = "default") -> list[str]:
        """Command line of the run with ``tag`` and further words."""
        own = ["--cfg", self.cfg, "--data-path", self.data, "--output", self.output, "--tag", tag]
        return [str(word) for word in (*own, *words)]

    def train(self, *words: Any, tag: str = "default") -> Path:
        """Train in this process; return the output folder."""
        main.main(self.argv(*words, tag=tag))
        return self.output / "tiny" / tag

    def evaluate(self, checkpoint: Path, *words: Any, tag: str = "eval") -> dict[str, Any]:
        """Evaluate in this process; return the contents of eval.json."""
        main_eval.main(self.argv("--resume", checkpoint, *words, tag=tag))
        return json.loads((self.output / "tiny" / tag / "eval.json").read_text())
