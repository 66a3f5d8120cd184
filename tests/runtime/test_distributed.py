"""Work that rank 0 does for all: its result, or its error, reaches every process."""

import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import CheckpointError
from utils.runtime import on_main_process

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys, torch.distributed as dist
from utils.errors import CheckpointError
from utils.runtime import on_main_process

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)

def act():
    print("acts", end=" ")
    return {"answer": 42}

def fail():
    raise CheckpointError("no space")

def fail_on_disk():
    raise OSError(28, "No space left on device", "/x")

print(rank, on_main_process(act), end=" ")
for action in (fail, fail_on_disk):
    try:
        on_main_process(action)
    except Exception as error:
        print(type(error).__name__, error, end=" ")
dist.destroy_process_group()
"""


def test_every_process_gets_the_result_and_the_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    errors = "CheckpointError no space OSError [Errno 28] No space left on device: '/x' "
    assert outputs == [f"acts 0 {{'answer': 42}} {errors}", f"1 {{'answer': 42}} {errors}"]


def test_without_a_process_group() -> None:
    assert on_main_process(lambda: 3) == 3
    with pytest.raises(CheckpointError, match="gone"):
        on_main_process(lambda: (_ for _ in ()).throw(CheckpointError("gone")))
