"""The benchmark measures what it says, on the CPU, with very small networks."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from models import StripMLPNet
from tests.tiny_run import TinyRun
from tools import benchmark
from tools.bench import floor, loop, timing
from tools.bench.candidates import Candidate, Setting, build_network, build_workload
from tools.bench.floor import Roof, Work, floor_seconds, measure_roof, work_of
from tools.bench.gpu import gpu_tables
from tools.bench.loader import loader_table, pipeline_configs, stage_table
from tools.bench.models import model_table
from tools.bench.plots import plot_accuracy
from tools.bench.profile import operation_group, part_table, time_by_group
from tools.bench.report import Table, allocator, environment
from tools.bench.timing import Spread, Stopwatch, measure_paired, paired_ratio

CPU = torch.device("cpu")
SETTING = Setting("infer", batch=2, img_size=32, device=CPU)

default_cfgs = generate_default_cfgs({"strip_mlp_nano": {"fixed_input_size": True, "input_size": (3, 32, 32)}})


@register_model
def strip_mlp_nano(pretrained: bool = False, **kwargs) -> StripMLPNet:
    """Known to timm, as the benchmark asks for models by name."""
    ignored = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    kwargs = {key: value for key, value in kwargs.items() if key not in ignored}
    return StripMLPNet(embed_dim=8, depths=(1, 1, 1, 1), num_classes=10, **kwargs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("tiny"))


def test_candidates_by_name() -> None:
    assert Candidate.parse("resnet50") == Candidate("resnet50", "eager", "fp32")
    assert Candidate.parse("strip_mlp_tiny:bf16:inference").label == "strip_mlp_tiny:inference:bf16"
    assert Candidate.parse("reference_base", precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match="'quick' is neither a form .*eager.* nor a precision"):
        Candidate.parse("resnet50:quick")
    with pytest.raises(ValueError, match="knows no model 'resnet51'"):
        Candidate.parse("resnet51")


def test_impossible_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="tf32 is a format of NVIDIA GPUs"):
        build_workload(Candidate("strip_mlp_nano", precision="tf32"), SETTING)
    with pytest.raises(ValueError, match="to_inference"):
        build_workload(Candidate("test_resnet", form="inference"), SETTING)


def test_reference_is_the_plain_formulation_of_the_same_size() -> None:
    ours, plain = build_network("strip_mlp_tiny_light", 32), build_network("reference_tiny_light", 32)
    assert type(plain).__name__ == "ReferenceStripMLP"
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain.parameters())


def test_a_training_step_trains() -> None:
    """The optimizer's state and the weights move, and nothing is left of the gradients."""
    workload = build_workload(Candidate("strip_mlp_nano"), Setting("train", 2, 32, CPU))
    network = workload.run.__closure__
    cells = [cell.cell_contents for cell in network]
    model = next(cell for cell in cells if isinstance(cell, nn.Module))
    before = model.head.weight.detach().clone()
    workload.run()
    assert not torch.equal(before, model.head.weight)
    assert model.head.weight.grad is None
    optimizer = next(cell for cell in cells if isinstance(cell, torch.optim.Optimizer))
    assert optimizer.defaults["fused"]


class FakeStopwatch:
    clock = "fake"

    def __init__(self, costs: dict) -> None:
        self.costs, self.order = costs, []

    def seconds(self, run, repeats: int = 1) -> float:
        self.order.append((run, repeats))
        return self.costs[run]


def test_contestants_take_turns_and_slow_ones_run_once() -> None:
    def fast() -> None: ...
    def slow() -> None: ...

    watch = FakeStopwatch({fast: 0.1, slow: 2.0})
    times = measure_paired([fast, slow], watch, rounds=3, min_seconds=1.0)
    assert times == [[0.1] * 3, [2.0] * 3]
    assert watch.order[2:] == [(fast, 10), (slow, 1), (slow, 1), (fast, 10), (fast, 10), (slow, 1)]


def test_ratio_is_taken_round_by_round() -> None:
    """A machine that is twice as slow in one round changes neither ratio."""
    assert paired_ratio([1.0, 2.0, 1.0], [3.0, 6.0, 3.0]) == Spread(3.0, 3.0, 3.0)


def test_work_counts_products_and_what_they_read_and_write(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.GELU(), nn.Conv2d(5, 2, 2, stride=2), nn.BatchNorm2d(2))
    monkeypatch.setattr(floor, "build_network", lambda *_: network)
    work = work_of.__wrapped__("any", 8)
    assert work.flops == 2 * (64 * 3 * 5 + 16 * 4 * 5 * 2)
    assert work.map_elements == 64 * (3 + 5) + (64 * 5 + 16 * 2)
    assert work.weight_elements == sum(p.numel() for p in network.parameters())


def test_work_of_the_published_network() -> None:
    assert work_of("strip_mlp_tiny", 224).flops / 2e9 == pytest.approx(3.65, abs=0.01)  # multiply-accumulates


def test_floor_is_the_longer_of_arithmetic_and_traffic() -> None:
    work, arithmetic = Work(flops=100, map_elements=10, weight_elements=5), Roof(flops=100.0, bytes=1e9)
    traffic = Roof(flops=1e9, bytes=4.0)
    assert floor_seconds(work, arithmetic, train=False, batch=2, precision="fp32") == 2.0
    assert floor_seconds(work, arithmetic, train=True, batch=2, precision="fp32") == 6.0
    assert floor_seconds(work, traffic, train=False, batch=2, precision="fp32") == 25.0
    assert floor_seconds(work, traffic, train=False, batch=2, precision="bf16") == 12.5


def test_roof_is_plausible() -> None:
    roof = measure_roof(CPU, "fp32")
    assert 1e9 < roof.flops < 1e15
    assert 1e8 < roof.bytes < 1e13


def test_model_table(tmp_path: Path) -> None:
    candidates = [Candidate("strip_mlp_nano"), Candidate("strip_mlp_nano", precision="bf16")]
    baseline = Candidate("test_resnet")
    for mode in ("train", "infer"):
        table = model_table(
            candidates, [baseline], Setting(mode, 2, 32, CPU), stopwatch=Stopwatch(CPU), rounds=2, min_seconds=0.01
        )
        assert [row["label"] for row in table.rows] == ["strip_mlp_nano", "strip_mlp_nano:bf16", "test_resnet"]
        for row in table.rows:
            assert row["images_per_second"] == pytest.approx(2000 / row["milliseconds"])
            assert len(row["seconds"]) == 2
        assert "ratio test_resnet" in table.rows[0]
        assert "ratio test_resnet" not in table.rows[2]
        lines = table.text().splitlines()
        assert "batch 2, 32 x 32" in lines[1]
        assert "1 thread(s), CPU time, 2 interleaved rounds" in lines[1]
        assert "GFLOP/s" in lines[-1]


def test_growth_of_memory_is_seen() -> None:
    small, large = (
        timing.resident_growth(Candidate("strip_mlp_tiny_light"), Setting("train", batch, 32, CPU), 1)
        for batch in (2, 64)
    )
    assert 2**20 < small < large < 2**31


def test_the_gpu_suite_runs_on_a_cpu() -> None:
    tables: list[Table] = []
    gpu_tables(
        CPU,
        variants=("strip_mlp_nano",),
        baselines=("test_resnet",),
        precisions=("bf16", "fp32"),
        batches=(2, 1),
        img_size=32,
        rounds=1,
        compiled=False,
        finished=tables.append,
    )
    measured = [table for table in tables if table.facts]
    assert len(tables) == len(measured) + 3  # by kind of kernel, for the first precision
    facts = [(table.facts["mode"], table.facts["batch"], table.rows[0]["precision"]) for table in measured]
    assert facts == [
        (mode, batch, precision)
        for precision in ("bf16", "fp32")
        for mode, batch in (("train", 2), ("infer", 2), ("infer", 1))
    ]
    folded = ["inference"] if hasattr(StripMLPNet, "to_inference") else []
    assert [row["form"] for row in tables[-1].rows] == ["eager", *folded, "eager"]


@pytest.mark.parametrize("train", (True, False))
def test_loader_tables(tiny: TinyRun, tmp_path: Path, train: bool) -> None:
    configs = pipeline_configs(str(tiny.data), train=train, batch=4, workers=0, folder=tmp_path, cfg=tiny.cfg)
    table = loader_table(configs, train=train, rounds=1, device=CPU)
    assert table.rows[0]["label"] == "reference"
    assert table.rows[0]["ratio"].startswith("1.00")
    assert all(row["images_per_second_core"] > 0 for row in table.rows)
    assert len(table.rows) == 4
    stages = stage_table(configs, train=train, images=8)
    labels = [row["label"] for row in stages.rows]
    assert labels[:2] == ["read", "decode"]
    assert {"collate", "sum"} <= set(labels)
    parts, total = stages.rows[:-1], stages.rows[-1]
    assert total["reference seconds"] == pytest.approx(sum(row["reference seconds"] or 0 for row in parts))


def test_end_to_end_table(tiny: TinyRun, capsys: pytest.CaptureFixture) -> None:
    keys = {"DATA.DATA_PATH": str(tiny.data)}
    table = loop.end_to_end_table(tiny.cfg, keys, [], updates=2, rounds=2)
    names = ["bare step, random images", "training loop", "loader alone"]
    assert [row["label"] for row in table.rows] == names
    assert table.rows[1]["data_wait"].endswith("%")
    with pytest.raises(SystemExit):
        loop.end_to_end_table(tiny.cfg, keys, [], updates=7, rounds=1)
    assert "an epoch has 6 updates, fewer than the 7 asked for" in capsys.readouterr().out


def test_startup_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Python that prints the log of a run."""
    program = tmp_path / "python"
    log = "x command: y\\nx data: y\\nx update: y\\nx update 1/9\\n"
    program.write_text(f"#!/bin/sh\n[ \"$1\" = -c ] || printf '{log}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(loop.sys, "executable", str(program))
    table = loop.startup_table(2)
    assert [row["label"] for row in table.rows][-1] == "first update"
    program.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(RuntimeError, match="ended before its first update"):
        loop._first_update({"first update": " update 1/"})


def test_environment_says_what_a_number_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert "MALLOC_MMAP_MAX_=0" in allocator()
    facts = environment(CPU)
    assert {"date", "commit", "device", "cpu", "threads", "load", "allocator", "versions"} <= set(facts)
    assert facts["threads"].startswith("1 of ")
    assert os.uname().nodename not in json.dumps(facts)


def test_operations_by_group() -> None:
    assert operation_group("aten::mkldnn_convolution") == "convolution, 1x1 too"
    assert operation_group("aten::native_layer_norm") == "normalisation"
    assert operation_group("aten::addmm") == "matrix product"
    assert operation_group("aten::add_") == "sum, product"
    assert operation_group("something") == "other"
    seconds = time_by_group(build_workload(Candidate("strip_mlp_nano"), SETTING).run, CPU)
    assert seconds["convolution, 1x1 too"] > 0


def test_parts_add_up_to_the_network() -> None:
    table = part_table([Candidate("strip_mlp_nano"), Candidate("test_resnet")], SETTING, repeats=1)
    labels = [row["label"] for row in table.rows]
    assert labels[:3] == ["patch embedding", "stage 1 strip mixing", "stage 1 channel mixing"]
    assert labels[-2:] == ["merging, skips", "rest"]
    assert all(row["strip_mlp_nano seconds"] > 0 for row in table.rows)
    assert [heading for heading, _ in table.columns] == ["", "strip_mlp_nano", "GFLOP/s"]


def test_accuracy_is_drawn_for_models_with_a_published_one(tmp_path: Path) -> None:
    columns = [("", "label")]
    row = {"label": "x", "name": "strip_mlp_base", "form": "inference", "images_per_second": 9.0}
    assert plot_accuracy(Table("title", columns, [row]), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_accuracy(Table("title", columns, [{**row, "name": "resnet18"}]), tmp_path / "b.png")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["model", "strip_mlp_nano", "--vs", "test_resnet", "--img-size", "32", "--batch", "2", "--rounds", "1"]
    benchmark.main([*words, "--min-seconds", "0.01", "--json", str(tmp_path / "out/r.json"), "--plot", str(tmp_path)])
    out = capsys.readouterr().out
    assert "allocator" in out
    assert "x test_resnet" in out
    result = json.loads((tmp_path / "out/r.json").read_text())
    assert set(result) == {"command", "environment", "tables"}
    assert result["tables"][0]["rows"][0]["name"] == "strip_mlp_nano"
    assert (tmp_path / "operations_infer_batch2_fp32.png").exists()
    assert (tmp_path / "parts_infer_batch2_fp32.png").exists()


def test_faults_of_the_user_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: .*knows no model 'strip_mlp'.*strip_mlp_tiny"):
        benchmark.main(["model", "strip_mlp"])
    with pytest.raises(SystemExit, match="error: .*train"):
        benchmark.main(["loader", "--data-path", str(tmp_path)])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU is visible"):
            benchmark.main(["gpu"])


def test_nano_is_ours() -> None:
    assert isinstance(timm.create_model("strip_mlp_nano", img_size=32), StripMLPNet)
