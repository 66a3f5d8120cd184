"""What a network executes is counted without running it; the figures must not grow unnoticed."""

import pytest
import torch
from timm.models import register_model
from torch import Tensor, nn

from models.blocks import StripMLPBlock
from tools import benchmark
from tools.bench.candidates import Candidate, Setting
from tools.bench.count import count, count_compiled

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def per_image(name: str, mode: str) -> dict[str, float]:
    return count(Candidate.parse(name), Setting(mode, 16, 224, GPU, channels_last=True), mode).per_image(16)


@pytest.mark.parametrize(
    ("name", "mode", "kernels", "megabytes", "kept"),
    (
        ("strip_mlp_tiny:bf16", "train", 2197, 653, 81.6),
        ("strip_mlp_tiny:lean:bf16", "train", 2973, 738, 51.6),
        ("strip_mlp_tiny:inference:bf16", "infer", 884, 242, 0),
    ),
)
def test_the_path_of_a_gpu_does_not_grow(name: str, mode: str, kernels: int, megabytes: float, kept: float) -> None:
    """The published formulation: 3675 kernels, 1173 MB, 92.5 MB kept; inference: 1553 kernels, 421 MB."""
    found = per_image(name, mode)
    assert found["waits"] == 0
    assert found["kernels"] <= kernels
    assert found["MB"] <= megabytes * 1.005
    assert found["kept"] <= kept * 1.005


class Waiting(nn.Module):
    """A network whose host reads a number in each forward pass and copies an index."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(dim=(2, 3))  # 1 kernel, reads the images
        return self.fc(x) * x.sum().item()  # 3 kernels, one wait


@register_model
def waiting_net(pretrained: bool = False, **_ignored) -> Waiting:
    """Known to timm, as the benchmark asks for models by name."""
    return Waiting()


def test_kernels_bytes_and_waits_of_a_known_network() -> None:
    counts = count(Candidate("waiting_net"), Setting("infer", 2, 8, CPU), "infer")
    images, pooled, scores, weights = 2 * 3 * 64 * 4, 2 * 3 * 4, 2 * 10 * 4, 3 * 10 * 4 + 10 * 4
    by_operation = {operation: size for (operation, _), size in counts.moved.items()}
    assert by_operation == {
        "mean": images + pooled,
        "addmm": pooled + weights + scores,
        "sum": pooled + 4,
        "mul": scores + scores,
    }
    assert counts.kernels.total() == 4
    assert dict(counts.waits) == {"_local_scalar_dense": 1}
    assert {part for operation, part in counts.kernels if operation == "addmm"} == {"fc"}


def test_backward_work_belongs_to_the_part_that_caused_it() -> None:
    counts = count(Candidate("waiting_net"), Setting("train", 2, 8, CPU), "train")
    assert counts.kernels["mm", "fc"] == 1  # the weight's gradient; the images need none
    assert counts.kept["fc"] == 2 * 3 * 4


class Row(nn.Sequential):
    """A network with a forward pass of its own: not every release of PyTorch compiles that of ``nn.Sequential``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_budget_makes_compiled_code_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_) -> Row:
        between = nn.GELU(), nn.BatchNorm2d(4), nn.GELU()
        return Row(nn.Conv2d(3, 4, 1), *between, nn.Conv2d(4, 10, 8), nn.Flatten())

    monkeypatch.setattr("tools.bench.count.build_network", build)
    candidate, setting = Candidate("resnet18"), Setting("train", 2, 8, GPU, channels_last=True)
    eager = count(candidate, setting, "train")
    kept = {b: count_compiled(candidate, setting, "train", eager, budget=b).kept.total() for b in (1.0, 0.0)}
    assert 0 < kept[0.0] < 0.7 * kept[1.0] < 0.7 * eager.kept.total()


def test_compiled_code_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two convolutions, all operations are one kernel, which reads and writes the map once."""

    def build(*_) -> Row:
        norm = nn.Sequential(nn.GELU(), nn.BatchNorm2d(4), nn.GELU())
        return Row(nn.Conv2d(3, 4, 1, bias=False), norm, nn.Conv2d(4, 5, 1, bias=False))

    monkeypatch.setattr("tools.bench.count.build_network", build)
    candidate, setting = Candidate("resnet18"), Setting("infer", 2, 8, GPU, channels_last=True)
    eager = count(candidate, setting, "infer")
    compiled = count_compiled(candidate, setting, "infer", eager)
    assert (eager.kernels.total(), compiled.kernels.total()) == (5, 3)
    images, between, scores, weights, norm = 2 * 3 * 64, 2 * 4 * 64, 2 * 5 * 64, 3 * 4 + 4 * 5, 4 * 4
    assert compiled.moved.total() == 4 * (images + between + 2 * between + between + scores + weights + norm)


def test_compiled_blocks_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel casts a block's weights, one their gradients. Cast one by one, there are 164 kernels."""

    def build(*_) -> Row:
        return Row(nn.Conv2d(3, 16, 1), StripMLPBlock(16, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setattr("tools.bench.count.build_network", build)
    candidate, setting = Candidate("resnet18", precision="bf16"), Setting("train", 16, 8, GPU, channels_last=True)
    compiled = count_compiled(candidate, setting, "train", count(candidate, setting, "train"))
    assert 0 < compiled.kernels.total() <= 135


def test_count_command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark.main(["count", "waiting_net", "--batch", "2", "--img-size", "8", "--by", "operation", "part"])
    out = capsys.readouterr().out
    assert "counts on cuda, batch 2, 8 x 8, fp32" in out
    assert "waiting_net, infer, by operation" in out
    assert "waiting_net, train, by part" in out
    with pytest.raises(SystemExit, match="error: waiting_net:compiled: only what runs operation by operation"):
        benchmark.main(["count", "waiting_net:compiled"])
