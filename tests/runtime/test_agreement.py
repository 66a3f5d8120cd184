"""Processes that disagree are refused before training, all with the same message; what suits a host may differ."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_run import TinyRun
from utils.config import load_config
from utils.runtime.agreement import HOST_KEYS, code_digests, start_facts

ROOT = Path(__file__).resolve().parents[2]
HOST = socket.gethostname()

SCRIPT = """
import json, sys, torch.distributed as dist
from utils.runtime import load_on_main_process, require_agreement
import torch

rank, store, facts = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
for own in facts:
    try:
        require_agreement(lambda: own[rank], remedy="start over")
        print("agreed")
    except RuntimeError as error:
        print(error)
tree = {"a": [torch.tensor(-0.0), torch.arange(6).reshape(2, 3).t()], "b": (torch.empty(0), 3, True)}
got = load_on_main_process(lambda: tree if rank == 0 else 1 / 0)
assert torch.signbit(got["a"][0]) and torch.equal(got["a"][1], tree["a"][1]) and got["b"][1:] == (3, True), got
assert got["b"][0].shape == (0,)
dist.destroy_process_group()
"""


def two(*commands: list[str]) -> list[str]:
    """Run two command lines at the same time; return what they print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)
        for command, own in ((command, {**environment, "RANK": str(i)}) for i, command in enumerate(commands))
    ]
    return [process.communicate(timeout=120)[0] for process in processes]


def test_every_process_names_the_key_and_both_values(tmp_path):
    facts = json.dumps([[{"k": 1}, {"k": 1}], [{"k": 1, "same": 2}, {"k": [2], "same": 2, "more": "x"}]])
    outputs = two(*([sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store"), facts] for rank in range(2)))
    expected = (
        "agreed\nthe processes of this run disagree:\n"
        f"  k: 1 on rank 0 ({HOST}), [2] on rank 1 ({HOST})\n"
        f"  more: nothing on rank 0 ({HOST}), x on rank 1 ({HOST})\n"
        "  start over\n"
    )
    assert outputs == [expected, expected]


def facts_of(tiny: TinyRun, *opts: object) -> dict:
    return start_facts(load_config(tiny.cfg, [str(word) for word in opts]), torch.device("cpu"))


def test_which_settings_have_to_be_equal(tmp_path):
    tiny = TinyRun(tmp_path)
    plain = facts_of(tiny, "DATA.DATA_PATH", "/a")
    assert plain == facts_of(tiny, "DATA.DATA_PATH", "/b", "DATA.NUM_WORKERS", 3, "OUTPUT", "/scratch")
    for key, value in (("TRAIN.BASE_LR", 0.5), ("TRAIN.EPOCHS", 3), ("DATA.BATCH_SIZE", 2), ("TRAIN.SAVE_STEPS", 9)):
        assert facts_of(tiny, "DATA.DATA_PATH", "/a", key, value)[key] != plain[key]
    assert facts_of(tiny)["DATA.DATA_PATH"] != plain["DATA.DATA_PATH"]
    assert not HOST_KEYS & set(plain)


def test_edited_code_is_another_code(tmp_path):
    (tmp_path / "utils").mkdir()
    for name in ("main.py", "utils/a.py"):
        (tmp_path / name).write_text("x = 1\n")
    before = code_digests(tmp_path)
    (tmp_path / "utils/a.py").write_text("x = 2\n")
    after = code_digests(tmp_path)
    assert [name for name in before if before[name] != after[name]] == ["utils/a.py"]
    assert {"main.py", "utils/session.py", "models/__init__.py"} <= set(code_digests(ROOT))


@pytest.mark.faults
@pytest.mark.parametrize("case", ("settings", "data"))
def test_a_run_that_disagrees_ends_before_training(tmp_path, monkeypatch, case):
    tiny = TinyRun(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    words = [["--seed", 3], []]
    if case == "data":
        other = TinyRun(tmp_path / "copy") if (tmp_path / "copy").mkdir() is None else None
        next((other.data / "train").rglob("*.*g")).unlink()
        words = [["--data-path", other.data], []]
    outputs = two(*([sys.executable, "main.py", *tiny.argv(), *map(str, own)] for own in words))
    for rank, output in enumerate(outputs):
        assert f"rank {rank} on {HOST} stops while" in output, output
        if case == "settings":
            assert f"SEED: 3 on rank 0 ({HOST}), 0 on rank 1 ({HOST})" in output
        else:
            assert f"train: images: 23 on rank 0 ({HOST}), 24 on rank 1 ({HOST})" in output
            assert "give every host the same files" in output
        assert "epoch 1" not in output
        assert "Traceback" not in output
