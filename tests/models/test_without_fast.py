"""A copy of the repository without ``models/fast``: it imports, trains, evaluates and gives the published scores."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tiny_run import TinyRun

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("models", "data", "utils", "tools", "tests", "main.py", "main_eval.py", "inference.py", "pyproject.toml")


def copy_without_fast(target: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "fast")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target / name)
    (target / "models" / "fast" / "__pycache__").mkdir(parents=True)  # what Python leaves of a deleted package
    return target


SCRIPT = """
import json, sys
import main, main_eval, pytest
train, evaluate, golden = json.loads(sys.argv[1])
main.main(train)
main_eval.main(evaluate)
sys.exit(pytest.main(golden))
"""


def test_everything_works_without_the_fast_forms(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    root, run = copy_without_fast(tmp_path / "copy"), TinyRun(tmp_path)
    checkpoint = run.output / "tiny" / "default" / "checkpoint_last.pth"
    golden = [
        f"tests/models/test_golden.py::{name}" for name in ("test_logits_and_stages", "test_gradients_and_buffers")
    ]
    words = json.dumps([run.argv(), run.argv("--resume", checkpoint, tag="eval"), ["-q", "-k", "nano32", *golden]])
    command = [sys.executable, "-c", SCRIPT, words]  # one process, because importing everything takes longest
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run.output / "tiny" / "eval" / "eval.json").read_text())["num_samples"] == 9
