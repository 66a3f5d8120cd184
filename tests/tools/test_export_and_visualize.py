"""A model leaves as files that others read, and can be looked at."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from inference import open_checkpoint
from models import from_published
from tests.builders import tiny_network
from tests.tiny_run import TinyRun
from tools import export, graphs, model_folder, receptive_field, visualize
from tools.common import run_tool
from utils.checkpoint import load_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = TinyRun(tmp_path_factory.mktemp("run"))
    run.folder = run.train("--opts", "TRAIN.EPOCHS", "1")
    return run


def test_a_folder_is_read_by_us_and_by_timm(run: TinyRun, tmp_path: Path) -> None:
    checkpoint, folder = run.folder / "checkpoint_last.pth", tmp_path / "folder"
    assert export.command([str(checkpoint), "--format", "hub", "--output", str(folder)]) == 0
    before, after = open_checkpoint(checkpoint), open_checkpoint(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(before.model(images), after.model(images))
    assert torch.equal(before.model(images), theirs(images))
    assert after.classes == before.classes
    assert after.preprocessing == before.preprocessing
    assert after.metadata["accuracy"]["num_samples"] == 9
    assert run.evaluate(folder)["acc1"] == after.metadata["accuracy"]["acc1"]
    assert (folder / "README.md").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["crop_pct"] == 1.0  # images of 32 pixels are not cropped
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


class FakeHub:
    """Stands for the client of the hub, and keeps what is uploaded."""

    def __init__(self, there: list[str]) -> None:
        self.there = there
        self.calls: list[tuple] = []

    def create_repo(self, name: str, *, exist_ok: bool) -> None:
        self.calls.append((name, exist_ok))

    def file_exists(self, _repository: str, name: str) -> bool:
        return name in self.there

    def upload_folder(self, *, repo_id: str, folder_path: Path, **patterns: object) -> None:
        paths = filter_repo_objects(
            [path.name for path in folder_path.iterdir()], **{k: v for k, v in patterns.items() if "pattern" in k}
        )
        self.calls.append((repo_id, sorted(paths)))


@pytest.mark.parametrize("there", [[], ["README.md"]])
def test_a_push_uploads_the_files_of_the_model_alone(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str]
) -> None:
    hub, words = FakeHub(there), [str(run.folder / "checkpoint_last.pth"), "--format", "hub", "--output", str(tmp_path)]
    (tmp_path / "private.txt").write_text("not to be uploaded")
    monkeypatch.setattr(export, "HfApi", lambda: hub)
    assert export.command([*words, "--push", "me/mine"]) == 0
    assert hub.calls == [("me/mine", True), ("me/mine", sorted({*model_folder.FILES} - {*there}))]


def test_a_push_that_fails_is_one_line(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise LocalTokenNotFoundError("a token is needed;\nread this")

    monkeypatch.setattr(export.HfApi, "create_repo", refused)
    words = [str(run.folder / "checkpoint_last.pth"), "--format", "hub", "--output", str(tmp_path / "folder")]
    assert run_tool(export.command, [*words, "--push", "me/mine"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "cannot upload to me/mine" in message


def test_published_names_are_read_back(run: TinyRun, tmp_path: Path) -> None:
    checkpoint, file = run.folder / "checkpoint_last.pth", tmp_path / "published.pth"
    assert export.command([str(checkpoint), "--format", "published", "--output", str(file)]) == 0
    model = tiny_network()
    load_weights(model, str(file), remap=from_published)
    assert torch.equal(model.head.weight, open_checkpoint(checkpoint).model.head.weight)


def test_a_safetensors_file_is_evaluated_and_fine_tuned(run: TinyRun, tmp_path: Path) -> None:
    checkpoint, folder = run.folder / "checkpoint_last.pth", tmp_path / "folder"
    assert export.command([str(checkpoint), "--format", "safetensors", "--output", str(folder)]) == 0
    file = folder / "model.safetensors"
    assert run.evaluate(file, tag="exported")["acc1"] == run.evaluate(checkpoint)["acc1"]
    tuned = run.train("--pretrained", file, "--opts", "TRAIN.EPOCHS", "1", "TRAIN.BASE_LR", "5e-6", tag="tuned")
    weights = (open_checkpoint(path).model.head.weight for path in (checkpoint, tuned / "checkpoint_last.pth"))
    assert torch.allclose(*weights, atol=1e-4)


def test_an_onnx_file_takes_any_batch(run: TinyRun, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    checkpoint, file = run.folder / "checkpoint_last.pth", tmp_path / "model.onnx"
    assert export.command([str(checkpoint), "--format", "onnx", "--output", str(file)]) == 0
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = torch.randn(7, 3, 32, 32)
    (scores,) = session.run(["scores"], {"images": images.numpy()})
    expected = open_checkpoint(checkpoint, device="cpu").model(images)
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-3, atol=1e-4)


def test_an_exported_program_takes_any_batch(run: TinyRun, tmp_path: Path) -> None:
    checkpoint, file = run.folder / "checkpoint_last.pth", tmp_path / "model.pt2"
    assert export.command([str(checkpoint), "--format", "torch-export", "--device", "cpu", "--output", str(file)]) == 0
    images = torch.randn(7, 3, 32, 32)
    expected = open_checkpoint(checkpoint, device="cpu").model(images)
    torch.testing.assert_close(torch.export.load(file).module()(images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.faults  # compiling takes long
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_a_compiled_program_takes_any_batch(tmp_path: Path) -> None:
    model, batch = torch.nn.Linear(4, 3).eval(), torch.export.Dim("batch")
    program = torch.export.export(model, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    graphs.check(model, graphs.write_compiled(program, tmp_path / "model.pt2"), torch.zeros(2, 4))
    assert (tmp_path / "model.pt2").is_file()


def test_a_graph_that_computes_something_else_is_refused() -> None:
    model = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="differs from PyTorch at batch 1"):
        graphs.check(model, lambda images: images + 1, torch.zeros(2, 3))


def test_the_area_ratio_is_that_of_the_smallest_square() -> None:
    field = torch.zeros(5, 5)
    field[2, 2] = 9.0
    assert receptive_field.area_ratio(field, 0.99) == 1 / 25
    assert receptive_field.area_ratio(torch.ones(5, 5), 0.3) == 9 / 25


def test_the_receptive_field_of_a_convolution_is_its_window() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3, padding=1, bias=False))
    torch.nn.init.ones_(model[0].weight)
    model.feature_info = [{"module": "0", "num_chs": 2, "reduction": 1}]
    (field,) = receptive_field.receptive_fields(model, iter([torch.ones(2, 3, 9, 9)]))
    assert field.nonzero().amin(0).tolist() == [3, 3]
    assert field.nonzero().amax(0).tolist() == [5, 5]


def test_figures_are_written(run: TinyRun, tmp_path: Path) -> None:
    words = [str(run.folder / "checkpoint_last.pth"), "--data-path", str(run.data), "--count", "2"]
    assert visualize.command([*words, "--show", "erf", "strips", "--output", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["erf.png", "position_tables.png", "strip_weights.png"]


def test_two_checkpoints_are_compared(run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = run.folder / "checkpoint_last.pth"
    words = [str(file), "--data-path", str(run.data), "--count", "1", "--show", "erf", "--output", str(tmp_path)]
    assert run_tool(visualize.command, [*words, "--vs", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "tiny, stage 1: " in shown
    assert "default/checkpoint_last, stage 1: " in shown
    assert run_tool(visualize.command, [*words, "--vs", "nothing_of_the_kind"]) == 2
    assert "neither a file nor a model of timm" in capsys.readouterr().err


def test_class_activation_maps_are_written(run: TinyRun, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_grad_cam")
    words = [str(run.folder / "checkpoint_last.pth"), "--images", str(run.data), "--count", "2"]
    assert visualize.command([*words, "--show", "cam", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "cam.png").read_bytes().startswith(b"\x89PNG")
