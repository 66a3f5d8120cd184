"""Several processes: the measured update exchanges gradients as often as its name says, and the calculation by hand."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.tiny_run import TinyRun
from tools import benchmark
from tools.bench import scaling
from tools.bench.scaling import Cluster, Variant, all_reduce_seconds, build_update, predict, size, variants
from utils.config import load_config

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_are_exchanged_as_often_as_said(alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges, wrap = [], scaling.wrap_for_training

    def counted(*args, **options) -> DistributedDataParallel:
        model = wrap(*args, **options)

        def hook(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            exchanges.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, hook)
        return model

    monkeypatch.setattr(scaling, "wrap_for_training", counted)
    update = build_update(load_config(TinyRun(tmp_path).cfg), "none", CPU, 0)
    counts = {}
    for variant in variants(2, 3):
        exchanges.clear()
        update(variant)
        counts[variant.label] = exchanges.count(0)
    assert counts == {
        "one batch": 1,
        "3 batches, one exchange": 1,
        "one batch, bf16 gradients": 1,
        "one batch, no exchange": 0,
        "3 batches, 3 exchanges": 3,
    }


def test_a_ring_by_hand() -> None:
    """Four GPUs: six steps with a quarter of the bytes each."""
    cluster = Cluster("", 4, bandwidth=100.0, latency=0.5)
    assert all_reduce_seconds(400.0, cluster) == 6 * (1.0 + 0.5)


@pytest.mark.parametrize(
    ("bandwidth", "exchange", "exposed"),
    (
        (1e8, 1.5, 1.5 - 2 / 3),  # the backward pass hides two thirds of a second
        (1e9, 0.15, 0.0375),  # all but the last of four buckets
    ),
)
def test_an_update_by_hand(bandwidth: float, exchange: float, exposed: float) -> None:
    """One second of computing, 100 MB of gradients in four buckets, four GPUs."""
    cluster = Cluster("", 4, bandwidth, latency=0.0)
    found = predict(25_000_000, 1e9, cluster, batch=10, tflops=0.06)
    assert (found.computing, found.exchange, found.exposed) == pytest.approx((1.0, exchange, exposed))
    assert found.efficiency == pytest.approx(1 / (1 + exposed))
    assert found.worst_efficiency == pytest.approx(1 / (1 + exchange))
    half = predict(25_000_000, 1e9, cluster, batch=10, tflops=0.06, gradient_bytes=2)
    assert half.exchange == pytest.approx(exchange / 2)


def test_sizes_are_the_published_ones() -> None:
    parameters, macs = size(load_config("configs/smlp_tiny_light_alpha3_patch4_224_imagenet1k.yaml"))
    assert (parameters, round(macs / 1e9, 1)) == (18_243_920, 2.5)


def test_calculated_tables_say_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["scaling", "--predict", "--json", str(tmp_path / "out.json"), "--tflops", "50"]
    benchmark.main([*words, "--cfg", str(TinyRun(tmp_path).cfg), "--opts", "MODEL.NUM_CLASSES", "3"])
    tables = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert len(tables) == len(scaling.CLUSTERS) + 1
    assert all(table["title"].startswith("CALCULATED, not measured") for table in tables)
    assert "50.0 TFLOP/s" in capsys.readouterr().out
    slow, fast = (float(tables[i]["rows"][0]["exchange"]) for i in (2, 4))
    assert slow > fast


def test_one_process_has_to_be_measured() -> None:
    with pytest.raises(SystemExit, match=r"--processes \[2\]: efficiency is relative to 1"):
        benchmark.main(["scaling", "--processes", "2", "--device", "cpu"])


@pytest.mark.faults  # starts processes
def test_two_processes_take_turns_with_one(tmp_path: Path) -> None:
    words = ["scaling", "--device", "cpu", "--rounds", "2", "--updates", "1", "--json", str(tmp_path / "out.json")]
    benchmark.main([*words, "--accumulate", "2", "--cfg", str(TinyRun(tmp_path).cfg)])
    [table] = json.loads((tmp_path / "out.json").read_text())["tables"]
    cells = {(row["processes"], row["label"]): row for row in table["rows"]}
    assert set(cells) == {(n, v.label) for n in (1, 2) for v in variants(n, 2)}
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in cells.values())
    assert "efficiency" in cells[2, "2 batches, 2 exchanges"]
    assert "exchange" in cells[2, Variant("one batch, bf16 gradients").label]
