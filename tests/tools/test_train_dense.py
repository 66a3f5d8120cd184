"""The example of docs/DETECTION.md runs as it is written there."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "tools" / "train_dense.py")


def test_two_processes_train_both_tasks() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    small = ["--small", "--size", "64", "96", "--updates", "2", "--batch", "1"]
    out = subprocess.run(
        [*torchrun, SCRIPT, "detection", "segmentation", *small],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    losses = re.findall(r"^(\w+): loss (\S+) -> (\S+) after 2 updates$", out.stdout, re.MULTILINE)
    assert [task for task, *_ in losses] == ["detection", "segmentation"]
    assert all(float(after) < float(before) for _, before, after in losses)
