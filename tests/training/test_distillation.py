"""Distillation: the teacher's part of the loss, what the teacher sees, where it comes from, and exact resume."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference import open_checkpoint
from models import build_model, from_published
from tests.builders import config_with
from tests.tiny_run import TinyRun
from utils.checkpoint import load_teacher, preprocessing
from utils.checkpoint.files import load_checkpoint
from utils.errors import RunError
from utils.training.distillation import Teacher

pytestmark = pytest.mark.usefixtures("no_drawing")

PREPROCESSING = {"img_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.fixture(scope="module")
def teacher_file(tiny: TinyRun) -> Path:
    """The checkpoint of a wider network, with averaged weights."""
    return tiny.train("--opts", "TRAIN.EMA_DECAY", 0.5, "TRAIN.EPOCHS", 1, tag="teacher") / "checkpoint_last.pth"


class Recorder(nn.Module):
    """A network that notes what it sees and returns fixed scores."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.scores = scores
        self.seen: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen = images
        return self.scores + self.weight


def teacher_of(scores: Tensor, theirs: dict[str, Any] = PREPROCESSING, **options: Any) -> Teacher:
    config = config_with(**{f"TRAIN__DISTILL__{name}": value for name, value in options.items()})
    return Teacher(Recorder(scores), config, digest="d", ours=PREPROCESSING, theirs=theirs)


def test_soft_and_hard_loss() -> None:
    ours, theirs = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    images, loss = torch.randn(4, 3, 32, 32), torch.tensor(2.0)
    soft = teacher_of(theirs, KIND="soft", TEMPERATURE=3.0, WEIGHT=0.25).share(loss, ours, images)
    p, q = (theirs / 3).softmax(1), (ours / 3).softmax(1)
    expected = (p * (p / q).log()).sum(1).mean() * 9
    torch.testing.assert_close(soft, 0.75 * loss + 0.25 * expected)
    hard = teacher_of(theirs, KIND="hard", WEIGHT=0.25).share(loss, ours, images)
    torch.testing.assert_close(hard, 0.75 * loss + 0.25 * F.cross_entropy(ours, theirs.argmax(1)))
    (soft + hard).backward()
    assert ours.grad.abs().sum() > 0


def test_the_teacher_sees_the_same_images_at_its_own_size_and_scale() -> None:
    images = torch.rand(2, 3, 32, 32)
    same = teacher_of(torch.zeros(2, 5))
    same.scores(images)
    assert same.model.seen is images
    other = teacher_of(torch.zeros(2, 5), {"img_size": (48, 40), "mean": (0.0,) * 3, "std": (1.0,) * 3})
    other.scores(torch.full((2, 3, 32, 32), 0.5))
    torch.testing.assert_close(other.model.seen, torch.full((2, 3, 48, 40), 0.75))
    anything = teacher_of(torch.zeros(2, 5), {**PREPROCESSING, "img_size": None})
    anything.scores(images)
    assert anything.model.seen is images


def test_distillation_resumes_exactly_and_knows_its_teacher(
    tiny: TinyRun, teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    moved = tmp_path / "elsewhere.pth"
    moved.write_bytes(teacher_file.read_bytes())
    words = ("--opts", "TRAIN.DISTILL.KIND", "soft", "TRAIN.DISTILL.TEMPERATURE", 2.0, "TRAIN.DISTILL.TEACHER")
    whole = tiny.train(*words, teacher_file, "TRAIN.SAVE_STEPS", 4, "TRAIN.SAVE_KEEP", 9, tag="whole")
    middle = whole / "checkpoint_step_000000008.pth"
    resumed = tiny.train("--resume", middle, *words, moved, tag="resumed")
    ends = [load_checkpoint(folder / "checkpoint_last.pth") for folder in (whole, resumed)]
    assert ends[0]["teacher"] == ends[1]["teacher"] == load_checkpoint(middle)["teacher"]
    assert ends[0]["model"].keys() == load_checkpoint(teacher_file)["model"].keys()  # the teacher is not among them
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name]), name
    assert open_checkpoint(resumed / "checkpoint_last.pth", device="cpu").classes  # the student, without its teacher
    with pytest.raises(SystemExit):  # a student is another teacher
        tiny.train("--resume", middle, *words, whole / "checkpoint_last.pth", tag="other")
    out = capsys.readouterr().out
    assert "was trained with another teacher" in out
    assert "--allow-change TRAIN.DISTILL.TEACHER" in out
    assert "Traceback" not in out


def load(tiny: TinyRun, classes: int = 3, names: tuple[str, ...] = ("cat", "dog", "emu"), **options: Any) -> Teacher:
    keys = {f"TRAIN__DISTILL__{name}": value for name, value in {"KIND": "hard", **options}.items()}
    config = config_with(MODEL__NUM_CLASSES=classes, **keys)
    metadata = {"classes": list(names), "preprocessing": PREPROCESSING}
    return load_teacher(config, torch.device("cpu"), metadata, build=build_model, remap=from_published)


def test_averaged_weights_of_a_checkpoint_teach_without_using_random_numbers(tiny: TinyRun, teacher_file: Path) -> None:
    before = torch.get_rng_state()
    teacher = load(tiny, TEACHER=teacher_file)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in load_checkpoint(teacher_file)["ema"].items():
        assert torch.equal(teacher.model.state_dict()[name], value), name
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert load(tiny, TEACHER=teacher_file).digest == teacher.digest


def test_other_classes_are_refused(tiny: TinyRun, teacher_file: Path) -> None:
    with pytest.raises(RuntimeError, match="class 1 is 'dog' there and 'fox' here"):
        load(tiny, names=("cat", "fox", "emu"), TEACHER=teacher_file)
    with pytest.raises(RuntimeError, match="3 classes there, 4 here"):
        load(tiny, 4, ("cat", "dog", "emu", "fox"), TEACHER=teacher_file)


def test_a_teacher_from_timm(tiny: TinyRun, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    file = tmp_path / "resnet.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    teacher = load(tiny, TEACHER=file, TIMM_NAME="test_resnet")
    images = torch.randn(2, 3, 32, 32)
    own = model.pretrained_cfg
    shifted = (images * 0.5 + 0.5 - torch.tensor(own["mean"]).view(3, 1, 1)) / torch.tensor(own["std"]).view(3, 1, 1)
    torch.testing.assert_close(teacher.scores(images), model.eval()(shifted))
    with pytest.raises(RuntimeError, match=r"resnet.safetensors does not say what network it holds; name it in .*TIMM"):
        load(tiny, TEACHER=file)
    with pytest.raises(RunError, match="TIMM_NAME resnett: timm cannot make this teacher"):
        load(tiny, TEACHER=file, TIMM_NAME="resnett")
    with pytest.raises(ValueError, match=r"the teacher test_resnet knows 1000 classes, this run has 3"):
        load(tiny, TIMM_NAME="test_resnet")


def test_a_teacher_of_other_channels(tiny: TinyRun, teacher_file: Path) -> None:
    """Grey images are RGB to a teacher that takes RGB; any other difference is found before the training."""
    keys = {"TRAIN__DISTILL__KIND": "hard", "TRAIN__DISTILL__TEACHER": teacher_file}
    for channels in (1, 4):
        config = config_with(MODEL__NUM_CLASSES=3, MODEL__STRIP_MLP__IN_CHANS=channels, **keys)
        metadata = {"classes": ["cat", "dog", "emu"], "preprocessing": preprocessing(config)}
        make = partial(load_teacher, config, torch.device("cpu"), metadata, build=build_model, remap=from_published)
        if channels == 4:
            with pytest.raises(ValueError, match=r"takes images of 3 channel\(s\), this run has 4"):
                make()
            continue
        grey, rgb = torch.rand(2, 1, 32, 32), load(tiny, TEACHER=teacher_file)
        pixels = grey * metadata["preprocessing"]["std"][0] + metadata["preprocessing"]["mean"][0]
        own = load_checkpoint(teacher_file)["preprocessing"]
        mean, std = (torch.tensor(own[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        torch.testing.assert_close(make().scores(grey), rgb.model((pixels - mean) / std))


def test_a_teacher_that_is_not_there_is_named_with_its_key(tiny: TinyRun) -> None:
    with pytest.raises(FileNotFoundError, match=r"TRAIN.DISTILL.TEACHER: checkpoint 'gone.pth' does not exist"):
        load(tiny, TEACHER="gone.pth")


def test_a_teacher_needs_a_name(tiny: TinyRun, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        tiny.train("--opts", "TRAIN.DISTILL.KIND", "soft")
    assert "TRAIN.DISTILL.KIND is soft, but there is no teacher" in capsys.readouterr().err
