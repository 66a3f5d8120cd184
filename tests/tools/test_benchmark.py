"""The benchmark measures what it claims, on the CPU, with very small networks."""

import json
import os
from pathlib import Path

import pytest
import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from models import StripMLPNet
from tests.tiny_run import TinyRun
from tools import benchmark
from tools.bench import startup
from tools.bench.candidates import Candidate, Setting, build_network, build_workload
from tools.bench.memory import resident_growth
from tools.bench.reference import ReferenceStripMLP
from tools.bench.report import environment
from tools.bench.timing import Spread, measure_paired, paired_ratio

CPU = torch.device("cpu")
SMALL = ("--img-size", 32, "--batch", 2, "--rounds", 2, "--min-seconds", 0.01)

default_cfgs = generate_default_cfgs({"strip_mlp_nano": {"fixed_input_size": True, "input_size": (3, 32, 32)}})


@register_model
def strip_mlp_nano(pretrained: bool = False, **kwargs) -> StripMLPNet:
    """Known to timm, as the benchmark asks for models by name."""
    ignored = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    kwargs = {key: value for key, value in kwargs.items() if key not in ignored}
    return StripMLPNet(embed_dim=8, depths=(1, 1, 1, 1), num_classes=10, **kwargs)


@pytest.fixture
def measure(tmp_path: Path):
    """Run the command line; return what it wrote to the JSON file."""

    def run(*words) -> dict:
        file = tmp_path / "results/out.json"
        benchmark.main([str(word) for word in (*words, "--json", file)])
        return json.loads(file.read_text())

    return run


def test_candidates_by_name() -> None:
    assert Candidate.parse("resnet50") == Candidate("resnet50", "default", "fp32")
    assert Candidate.parse("strip_mlp_tiny:bf16:inference").label == "strip_mlp_tiny:inference:bf16"
    assert Candidate.parse("reference_base", precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match="'quick' is neither a form .*plain.* nor a precision"):
        Candidate.parse("resnet50:quick")
    with pytest.raises(ValueError, match="has no model 'resnet51'"):
        Candidate.parse("resnet51")


def test_reference_has_the_size_of_the_variant() -> None:
    for variant in ("tiny_light", "tiny", "small", "base"):
        with torch.device("meta"):
            ours = build_network(Candidate(f"strip_mlp_{variant}"), 32)
            plain = build_network(Candidate(f"reference_{variant}"), 32)
        assert isinstance(plain, ReferenceStripMLP)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain.parameters())
    assert len(build_network(Candidate("reference"), 32).blocks3) == 12


def test_an_update_trains() -> None:
    workload = build_workload(Candidate("strip_mlp_nano"), Setting("train", 2, 32, CPU))
    weight = workload.network.head.weight
    before = weight.detach().clone()
    workload.run()
    assert not torch.equal(before, weight)
    assert weight.grad is None


def test_inference_leaves_the_network_as_it_is() -> None:
    workload = build_workload(Candidate("strip_mlp_nano"), Setting("infer", 2, 32, CPU))
    before = {name: value.clone() for name, value in workload.network.state_dict().items()}
    workload.run()
    assert not workload.network.training
    torch.testing.assert_close(dict(workload.network.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(("form", "accelerated"), (("default", 1), ("plain", 0), ("inference", 1)))
def test_fast_forms_are_attached_unless_plain_is_asked_for(
    form: str, accelerated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[nn.Module, torch.device]] = []
    monkeypatch.setattr("models.accelerate", lambda *arguments, **_: calls.append(arguments))
    build_workload(Candidate("strip_mlp_nano", form), Setting("infer", 2, 32, CPU))
    assert [(type(network), device) for network, device in calls] == [(StripMLPNet, CPU)] * accelerated


class FakeStopwatch:
    clock = "fake"

    def __init__(self, costs: dict) -> None:
        self.costs, self.order = costs, []

    def seconds(self, run, repeats: int = 1) -> float:
        self.order.append((run, repeats))
        return self.costs[run]


def test_candidates_take_turns_and_slow_ones_run_once() -> None:
    def fast() -> None: ...
    def slow() -> None: ...

    watch = FakeStopwatch({fast: 0.1, slow: 2.0})
    times = measure_paired({"fast": fast, "slow": slow}, watch, rounds=3, min_seconds=1.0)
    assert times == {"fast": [0.1] * 3, "slow": [2.0] * 3}
    assert watch.order[2:] == [(fast, 10), (slow, 1), (slow, 1), (fast, 10), (fast, 10), (slow, 1)]


def test_ratio_is_taken_round_by_round() -> None:
    """A machine that is twice as slow in one round does not change the ratio."""
    assert paired_ratio([1.0, 2.0, 1.0], [3.0, 6.0, 3.0]) == Spread(3.0, 3.0, 3.0)


def test_memory_holds_at_least_gradients_and_moments() -> None:
    candidate = Candidate("strip_mlp_tiny_light")
    weights = sum(p.nbytes for p in build_network(candidate, 32).parameters())
    assert 3 * weights < resident_growth(candidate, Setting("train", 2, 32, CPU)) < 6 * weights


def test_model_command(measure, capsys: pytest.CaptureFixture) -> None:
    models = ("strip_mlp_nano", "strip_mlp_nano:bf16")
    result = measure("model", *models, "--vs", "test_resnet", "--mode", "train", "infer", *SMALL)
    assert set(result) == {"command", "environment", "tables"}
    assert [table["settings"]["mode"] for table in result["tables"]] == ["train", "infer"]
    for table in result["tables"]:
        assert [row["label"] for row in table["rows"]] == [*models, "test_resnet"]
        assert "batch 2, 32 x 32" in table["title"]
        assert "1 thread(s), CPU time, 2 rounds in turns" in table["title"]
        for row in table["rows"]:
            assert row["images_per_second"] == pytest.approx(sum(2 / s for s in row["seconds"]) / 2)
            assert len(row["seconds"]) == 2
            assert ("ratio test_resnet" in row) == (row["name"] != "test_resnet")
    out = capsys.readouterr().out
    assert out.index("allocator") < out.index("x test_resnet")


def test_gpu_command_runs_on_a_cpu_if_asked_to(measure) -> None:
    small = (*SMALL, "--batch", 2, 1, "--no-compile", "--device", "cpu")
    result = measure(
        "gpu", "--variants", "strip_mlp_nano", "--vs", "test_resnet", "--precision", "bf16", "fp32", *small
    )
    settings = [(t["rows"][0]["precision"], t["settings"]["mode"], t["settings"]["batch"]) for t in result["tables"]]
    cases = [("train", 2), ("infer", 2), ("infer", 1)]
    assert settings == [(precision, *case) for precision in ("bf16", "fp32") for case in cases]
    assert [row["form"] for row in result["tables"][0]["rows"]] == ["default", "default"]
    assert [row["form"] for row in result["tables"][1]["rows"]] == ["default", "inference", "default"]


@pytest.mark.parametrize("workers", (0, 1))
def test_loader_command(measure, tmp_path: Path, workers: int) -> None:
    tiny = TinyRun(tmp_path)
    words = ("--data-path", tiny.data, "--cfg", tiny.cfg, "--batch", 4, "--rounds", 1, "--images", 8)
    tables = measure("loader", *words, "--workers", workers)["tables"]
    assert [table["title"].split(",")[0] for table in tables[::2]] == ["training loader", "evaluation loader"]
    for table, stages in (tables[:2], tables[2:]):
        assert [row["label"] for row in table["rows"]][:2] == ["reference", "fast (default)"]
        assert len(table["rows"]) == 4
        assert table["rows"][0]["ratio"] == "1.00 (1.00 - 1.00)"
        assert all(row["images_per_second_core"] > 0 for row in table["rows"])
        assert stages["rows"][0]["label"] == "read, decode"
        *parts, total = stages["rows"]
        assert "collate" in {row["label"] for row in parts}
        assert total["label"] == "sum"
        assert total["reference seconds"] == pytest.approx(sum(row["reference seconds"] or 0 for row in parts))


def test_loader_command_for_small_images(measure) -> None:
    (table,) = measure("loader", "--small", "crop+mirror", "--batch", 128, "--rounds", 1)["tables"]
    assert table["title"].startswith("training loader, crop+mirror, 1438 images, batch 128, 32 pixels, 0 worker(s)")
    labels = ["plain data set, PIL", "plain data set, tensors", "fast (default)"]
    assert [row["label"] for row in table["rows"]] == labels
    assert all(row["images_per_second_core"] > 0 for row in table["rows"])


def test_startup_command(measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with a stand-in for Python that prints the log of a run."""
    program = tmp_path / "python"
    log = "x command: y\\nx data: y\\nx update: y\\nx update 1/9\\n"
    program.write_text(f"#!/bin/sh\n[ \"$1\" = -c ] || printf '{log}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(startup.sys, "executable", str(program))
    rows = measure("startup", "--rounds", 2)["tables"][0]["rows"]
    assert rows[-1]["label"] == "first update"
    assert all(len(row["seconds"]) == 2 for row in rows)
    program.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(RuntimeError, match="ended before its first update"):
        measure("startup")


def test_environment_shows_what_a_number_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    facts = environment(CPU)
    assert {"date", "commit", "device", "cpu", "threads", "load", "versions"} <= set(facts)
    assert "MALLOC_MMAP_MAX_=0" in facts["allocator"]
    assert facts["threads"].startswith("1 of ")
    assert os.uname().nodename not in json.dumps(facts)


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (("model", "strip_mlp"), "has no model 'strip_mlp'.*strip_mlp_tiny"),
        (("model", "strip_mlp_nano:tf32", "--img-size", 32), "tf32 is a format of NVIDIA GPUs"),
        (("model", "test_resnet:inference"), "only Strip-MLP has an inference form"),
        (("model", "strip_mlp_nano:inference", "--mode", "train", "--img-size", 32), "only for --mode infer"),
        (("loader", "--data-path", "/no/such/folder"), "/no/such/folder"),
        (("gpu",), "PyTorch sees no GPU"),
    ),
    ids=lambda case: None if isinstance(case, str) else " ".join(map(str, case)),
)
def test_mistakes_of_the_user_are_one_line(words: tuple, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as error:
        benchmark.main([str(word) for word in words])
    assert "\n" not in str(error.value)
