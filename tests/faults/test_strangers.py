"""Files from strangers, through every door: nothing of them is executed, and they are refused with a reason."""

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from yacs.config import CfgNode

from models import to_published
from tests.faults.harness import LAST, VAL_IMAGES, state_hash
from utils.checkpoint.files import load_checkpoint

SLOW = pytest.mark.faults
DOORS = {
    "--resume": ("main", ("--resume",)),
    "--pretrained": ("main", ("--pretrained",)),
    "main_eval --resume": ("main_eval", ("--resume",)),
    "main_eval --weights ema": ("main_eval", ("--weights", "ema", "--resume")),
    "--eval": ("main", ("--eval", "--resume")),
}


class Payload:
    """Pickles into a call of os.system that leaves a canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def enter(starter, door: str, path: Path, out: Path, **request):
    """Run the program with ``path`` at the door."""
    program, flags = DOORS[door]
    return starter.run(*flags, str(path), out=out, program=program, seconds=180, **request)


@pytest.fixture
def weights(reference) -> dict[str, torch.Tensor]:
    return load_checkpoint(reference())["model"]


def doors(*quick: str) -> list:
    return [door if door in quick else pytest.param(door, marks=SLOW) for door in DOORS]


@pytest.mark.parametrize("door", doors("--resume", "main_eval --resume"))
def test_malicious_checkpoint(starter, reference, tmp_path, door):
    """A real checkpoint with a payload, the protection switched off by the environment: refused, not executed."""
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    torch.save({**load_checkpoint(reference()), "zzz": Payload(canary)}, path)
    job = enter(starter, door, path, tmp_path / "out", env={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
    job.assert_failed(str(path), f"{os.name}.system", "could run code on this machine")
    assert not canary.exists()
    assert "Traceback" not in job.text()


@SLOW
@pytest.mark.parametrize("form", ("legacy file", "bare pickle", "in the average", "in the config"))
def test_malicious_checkpoint_of_other_forms(starter, weights, tmp_path, form):
    """Payload in a legacy file, a bare pickle, the averaged weights, the config: not executed."""
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"model": Payload(canary)}, protocol=2))
    else:
        entry = {"in the average": "ema", "in the config": "config"}.get(form, "x")
        content = {"model": weights, entry: Payload(canary)}
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy file")
    for door in ("--pretrained", "main_eval --resume"):
        enter(starter, door, path, tmp_path / "out").assert_failed(str(path))
    assert not canary.exists()


@SLOW
def test_malicious_newest_file_in_the_folder(starter, tmp_path):
    """A payload under the name of the run's own newest checkpoint: passed over, not executed, nothing started."""
    canary = tmp_path / "canary"
    folder = tmp_path / "tiny" / "default"
    folder.mkdir(parents=True)
    torch.save({"model": {}, "progress": Payload(canary)}, folder / LAST)
    job = starter.run(out=tmp_path).assert_failed(str(folder / LAST), f"{os.name}.system", "starting from zero")
    assert not canary.exists()
    assert "starting from scratch" not in job.text()


@SLOW
def test_payload_in_the_stored_config(starter, reference, tmp_path):
    """A checkpoint whose config text asks YAML or yacs to run Python: refused, not executed."""
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    script = tmp_path / "evil.py"
    script.write_text(f"open({str(canary)!r}, 'w')\ncfg = None\n")
    for text in (f"SEED: !!python/object/apply:os.system ['touch {canary}']\n", f"BASE: ['{script}']\n"):
        torch.save({**load_checkpoint(reference()), "config": text}, path)
        enter(starter, "--resume", path, tmp_path / "out").assert_failed(str(path))
        assert not canary.exists()


@SLOW
def test_published_file_is_fine(starter, reference, weights, tmp_path):
    """A file as the published code writes it, with its yacs node: evaluated, the same result as ours."""
    path = tmp_path / "published.pth"
    published = {f"module.{key}": value for key, value in to_published(weights).items()}
    config = CfgNode({"MODEL": CfgNode({"NAME": "theirs"})})
    torch.save({"model": published, "optimizer": {}, "epoch": 3, "max_accuracy": 80.0, "config": config}, path)
    results = []
    for source, tag in ((reference(), "ours"), (path, "theirs")):
        flags = ("--weights", "model") if tag == "ours" else ()
        job = starter.run("--resume", str(source), *flags, "--tag", tag, out=tmp_path, program="main_eval")
        assert job.codes == [0], job.text()
        results.append(json.loads((job.folder / "eval.json").read_text()))
    assert results[0]["num_samples"] == VAL_IMAGES
    assert (results[0]["acc1"], results[0]["loss"]) == (results[1]["acc1"], results[1]["loss"])
    starter.run("--resume", str(path), "--weights", "ema", out=tmp_path, program="main_eval").assert_failed(
        f"{path} holds no averaged weights"
    )
    starter.run("--resume", str(path), out=tmp_path).assert_failed("was not written by this project", "--pretrained")


NO_CHECKPOINTS = {
    "web page": (b"<!DOCTYPE html><html><body>Please log in</body></html>", "this is a web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "empty": (b"", "is empty (0 bytes)"),
    "zeros": (bytes(5000), "not a PyTorch checkpoint (starts with"),
}


@SLOW
@pytest.mark.parametrize("name", NO_CHECKPOINTS)
@pytest.mark.parametrize("door", ("--resume", "--pretrained", "main_eval --resume"))
def test_no_checkpoint_at_all(starter, tmp_path, name, door):
    """A web page, a git-lfs pointer, an empty file, zeros: the error says so, without advice to drop the protection."""
    content, reason = NO_CHECKPOINTS[name]
    path = tmp_path / "download.pth"
    path.write_bytes(content)
    job = enter(starter, door, path, tmp_path / "out").assert_failed(str(path), reason)
    assert "Traceback" not in job.text()


@SLOW
def test_safetensors_renamed(starter, weights, tmp_path):
    """A safetensors file under the name of a checkpoint: read as what it is."""
    path = tmp_path / "weights.pth"
    safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    assert enter(starter, "main_eval --resume", path, tmp_path).codes == [0]
    enter(starter, "--pretrained", path, tmp_path).assert_ok()
    enter(starter, "--resume", path, tmp_path).assert_failed("was not written by this project")


@pytest.mark.parametrize("door", doors("--pretrained"))
def test_huge_claim(starter, reference, tmp_path, door):
    """A small file that claims a tensor of 10^12 elements: refused by shape, without the memory for it."""
    payload = load_checkpoint(reference())
    key = next(iter(payload["model"]))
    huge = torch.zeros(1).expand(10**6, 10**6)
    path, report = tmp_path / "huge.pth", tmp_path / "memory.txt"
    torch.save({**payload, "model": {**payload["model"], key: huge}, "ema": {**payload["ema"], key: huge}}, path)
    job = enter(starter, door, path, tmp_path / "out", faults=[("report_memory", {"path": str(report)})])
    job.assert_failed(key, "1000000, 1000000")
    assert float(report.read_text()) < 200  # MiB


@SLOW
@pytest.mark.parametrize("door", ("--resume", "--pretrained", "main_eval --resume"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_weights_that_are_no_numbers(starter, reference, tmp_path, door, value):
    """NaN or infinite weights: refused, naming the first such entry."""
    payload = load_checkpoint(reference())
    key = list(payload["model"])[3]
    for part in ("model", "ema"):
        payload[part][key].view(-1)[0] = value
    torch.save(payload, tmp_path / "nan.pth")
    job = enter(starter, door, tmp_path / "nan.pth", tmp_path / "out")
    job.assert_failed(str(tmp_path / "nan.pth"), repr(key), "infinite or undefined values")


@SLOW
@pytest.mark.parametrize("door", ("--resume", "--pretrained", "main_eval --resume"))
@pytest.mark.parametrize(
    "url",
    ("https://example.org/weights.pth", "http://example.org/w.pth#sha256=" + 64 * "0"),
    ids=("no checksum", "no https"),
)
def test_address_without_checksum(starter, tmp_path, door, url):
    """An address without https or checksum: refused before any connection."""
    program, flags = DOORS[door]
    starter.run(*flags, url, out=tmp_path, program=program, seconds=60).assert_failed("needs https and its checksum")


@SLOW
def test_refusals_leave_the_run_alone(starter, reference, tmp_path):
    """A refused file, whatever the door, does not change the checkpoints that are there."""
    final = reference()
    before = {path.name: state_hash(path) for path in final.parent.glob("*.pth")}
    (tmp_path / "bad.pth").write_bytes(b"<html>")
    for door in set(DOORS) - {"--pretrained"}:  # which is not read where a run goes on
        enter(starter, door, tmp_path / "bad.pth", final.parents[2]).assert_failed("web page")
    assert {path.name: state_hash(path) for path in final.parent.glob("*.pth")} == before
