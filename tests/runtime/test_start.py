"""The start of the programs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# nobody needs these to train; each takes up to seconds to import
HEAVY = ("matplotlib", "sklearn", "scipy", "pandas", "onnx", "onnxruntime", "tensorboard", "IPython", "tools", "tests")


def test_starting_imports_nothing_heavy() -> None:
    program = f"import sys, main; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
