"""A copy of the repository without ``models/fast``: it imports, trains, evaluates and gives the published scores."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tiny_run import TinyRun

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("models", "data", "utils", "tools", "tests", "main.py", "main_eval.py", "pyproject.toml")


def copy_without_fast(target: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "fast")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target / name)
    (target / "models" / "fast" / "__pycache__").mkdir(parents=True)  # what Python leaves of a deleted package
    return target


def test_everything_works_without_the_fast_forms(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    root, run = copy_without_fast(tmp_path / "copy"), TinyRun(tmp_path)

    def python(*words: str) -> None:
        done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    python("main.py", *run.argv())
    checkpoint = run.output / "tiny" / "default" / "checkpoint_last.pth"
    python("main_eval.py", *run.argv("--resume", checkpoint, tag="eval"))
    assert json.loads((run.output / "tiny" / "eval" / "eval.json").read_text())["num_samples"] == 9
    golden = "tests/models/test_golden.py"
    python(
        "-m",
        "pytest",
        "-q",
        f"{golden}::test_logits_and_stages",
        f"{golden}::test_gradients_and_buffers",
        "-k",
        "nano32 or tiny_light",
    )
