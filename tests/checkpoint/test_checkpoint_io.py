"""Checkpoint files: written whole or not at all, and opened without running anything from them."""

import ast
import logging
import os
import pickle
import resource
import sys
import urllib.error
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from yacs.config import CfgNode

from utils.checkpoint.files import (
    first_nonfinite,
    link_checkpoint,
    load_checkpoint,
    resolve_source,
    sha256,
    verify_checkpoint,
    write_checkpoint,
)
from utils.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {"layer.weight": torch.arange(600.0).reshape(20, 30), "layer.bias": torch.ones(20)}
PAYLOAD = {"model": WEIGHTS, "progress": {"global_step": 3}, "config": "SEED: 1\n"}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.pth"
    write_checkpoint(path, PAYLOAD)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Evil:
    """Pickles into a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Unpicklable:
    def __reduce__(self):
        raise TypeError("this object cannot be pickled")


# writing


def test_what_is_written_is_what_is_read(good):
    loaded = load_checkpoint(good)
    assert all(torch.equal(loaded["model"][key], WEIGHTS[key]) for key in WEIGHTS)
    assert {key: loaded[key] for key in ("progress", "config")} == {key: PAYLOAD[key] for key in ("progress", "config")}
    assert verify_checkpoint(good)["model"]["layer.weight"].device.type == "meta"
    assert list(good.parent.iterdir()) == [good]


def test_flushed_before_it_is_visible(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    write_checkpoint(tmp_path / "a.pth", PAYLOAD)
    assert calls == ["fsync file", "rename", "fsync folder"]


@pytest.mark.parametrize(
    ("value", "reason"),
    (
        (Unpicklable(), "this object cannot be pickled"),
        (np.float64(1.0), "asks to import numpy"),
        (Path("x"), "asks to import pathlib"),
        (CfgNode({"A": 1}).items, "asks to import"),
    ),
    ids=("raises", "numpy number", "path", "method"),
)
def test_value_that_is_not_plain(good, value, reason):
    before = content(good.parent)
    with pytest.raises(CheckpointError, match=reason) as error:
        write_checkpoint(good, {**PAYLOAD, "extra": value})
    assert str(good) in str(error.value)
    assert content(good.parent) == before


def test_full_disk(good):
    before = content(good.parent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as error:
            write_checkpoint(good, PAYLOAD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value).startswith(f"cannot write checkpoint {good} (after ")
    assert "[errno 27] File too large" in str(error.value)
    assert content(good.parent) == before


def test_damage_while_writing_is_noticed(good, monkeypatch):
    """What the disk has is not what was sent: the old file stays."""
    before, save = content(good.parent), torch.save

    def damaging_save(payload, file) -> None:
        save(payload, file)
        file.seek(1500)
        file.write(b"\xff\x00\xff")

    monkeypatch.setattr(torch, "save", damaging_save)
    with pytest.raises(CheckpointError, match="cannot write checkpoint .* is damaged"):
        write_checkpoint(good, {**PAYLOAD, "model": {"w": torch.zeros(5000)}})
    assert content(good.parent) == before


def test_folder_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="No such file or directory"):
        write_checkpoint(tmp_path / "nowhere" / "a.pth", PAYLOAD)


@pytest.mark.parametrize("links", (True, False), ids=("hard link", "copy"))
def test_second_name(good, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    target = link_checkpoint(good, "last.pth")
    assert target.read_bytes() == good.read_bytes()
    assert os.path.samefile(target, good) == links
    link_checkpoint(good, "last.pth")  # replaces
    assert sorted(content(good.parent)) == ["good.pth", "last.pth"]


# reading: damage


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


SECOND_ROW = WEIGHTS["layer.weight"][1].numpy().tobytes()
DAMAGES = {
    "empty": (lambda data: b"", "is empty (0 bytes)"),
    "last byte missing": (lambda data: data[:-1], "damaged"),
    "half": (lambda data: data[: len(data) // 2], "damaged"),
    "second half zero": (lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2), "damaged"),
    "all zero": (lambda data: bytes(len(data)), "not a PyTorch checkpoint (starts with"),
    "bit in a tensor": (lambda data: flipped(data, data.index(SECOND_ROW)), "checksum"),
    "bit in the pickle": (lambda data: flipped(data, data.index(b"progress")), "checksum"),
    "web page": (lambda data: b"\n <!DOCTYPE html><html>login</html>", "this is a web page"),
    "git-lfs pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "text": (lambda data: b"hello", "not a PyTorch checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("read", (verify_checkpoint, load_checkpoint), ids=("verify", "load"))
def test_damaged_file(good, name, read):
    damage, reason = DAMAGES[name]
    good.write_bytes(damage(good.read_bytes()))
    with pytest.raises(CheckpointError) as error:
        read(good)
    message = str(error.value)
    if read is load_checkpoint and reason == "checksum":
        reason = "damaged"
    assert str(good) in message
    assert reason in message
    assert "weights_only" not in message


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match="cannot read checkpoint"):
            load_checkpoint(path)


def test_archives_that_are_no_checkpoints(good, tmp_path):
    other = tmp_path / "other.pth"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"other\.pth is damaged"):
        load_checkpoint(other)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        load_checkpoint(other)


@pytest.mark.parametrize("value", (torch.ones(3), [1, 2], 7), ids=("tensor", "list", "number"))
def test_not_a_dictionary(tmp_path, value):
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "a.pth")


def test_file_without_checksums(tmp_path, caplog):
    """A stranger's file may lack them and is only warned of; ours never does."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(PAYLOAD, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(load_checkpoint(tmp_path / "a.pth")["model"]["layer.bias"], torch.ones(20))
    assert "without checksums" in caplog.text
    with pytest.raises(CheckpointError, match="checksum"):
        verify_checkpoint(tmp_path / "a.pth")


def test_safetensors_under_any_name(tmp_path):
    path = tmp_path / "renamed.pth"
    safetensors.torch.save_file(WEIGHTS, path, metadata={"from": "elsewhere"})
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["layer.weight"], WEIGHTS["layer.weight"])
    assert loaded["metadata"] == {"from": "elsewhere"}
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"renamed\.pth is damaged"):
        load_checkpoint(path)


def test_huge_tensor_is_not_allocated(tmp_path):
    """A file of 2 kB that claims 10^12 elements."""
    path = tmp_path / "huge.pth"
    torch.save({"model": {"w": torch.zeros(1).expand(10**6, 10**6)}}, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert verify_checkpoint(path)["model"]["w"].shape == (10**6, 10**6)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


# reading: code


def save_legacy(payload: object, path: Path) -> None:
    torch.save(payload, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "save",
    (torch.save, save_legacy, lambda x, path: path.write_bytes(pickle.dumps(x, 2))),
    ids=("zip", "legacy", "bare pickle"),
)
@pytest.mark.parametrize("variables", ({}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}), ids=("", "switched off"))
def test_payload_is_not_executed(tmp_path, monkeypatch, save, variables):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    save({"model": WEIGHTS, "x": Evil(f"touch {canary}")}, path)
    for read in (load_checkpoint, verify_checkpoint):
        with pytest.raises(CheckpointError) as error:
            read(path)
        message = str(error.value)
        assert str(path) in message
        assert "weights_only" not in message
        if save is torch.save:
            assert f"{os.name}.system" in message
    assert not canary.exists()


def test_published_file_is_read_without_yacs(tmp_path, monkeypatch):
    node = CfgNode({"MODEL": CfgNode({"NAME": "theirs", "LAYERS": [2, 2]}), "SEED": 0})
    torch.save({"model": WEIGHTS, "config": node}, tmp_path / "published.pth")
    for name in [name for name in sys.modules if name.split(".")[0] == "yacs"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it again would fail
    loaded = load_checkpoint(tmp_path / "published.pth")
    assert torch.equal(loaded["model"]["layer.weight"], WEIGHTS["layer.weight"])
    assert type(loaded["config"]) is OrderedDict
    assert loaded["config"]["MODEL"]["LAYERS"] == [2, 2]


def test_legacy_file_with_weights_is_read(tmp_path):
    save_legacy({"model": WEIGHTS}, tmp_path / "old.pth")
    assert torch.equal(load_checkpoint(tmp_path / "old.pth")["model"]["layer.weight"], WEIGHTS["layer.weight"])


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute or name, '' for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


FORBIDDEN = (
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "Unpickler",
    "marshal.",
    "shelve.",
    "joblib.",
    "dill.",
    "cloudpickle.",
    "load_state_dict_from_url",
    "hub.load",
    "checkpoint.load",
    "dcp.load",
    "jit.load",
    "export.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "merge_from_file",
    "load_cfg",
    "import_module",
    "runpy.",
    "os.system",
)

OWN_FILES = ("tools/graphs.py: torch.export.load",)  # reads back what it has just written


def test_nothing_unpickles():
    """Nothing in the programs unpickles, reads yaml unsafely, or runs what a file names."""
    found = []
    folders = (ROOT / name for name in ("models", "data", "utils", "tools"))
    for path in sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func)
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe_yaml = name == "yaml.load" and "Safe" in words.get("Loader", "")
            if f"{path.relative_to(ROOT)}: {name}" in OWN_FILES:
                continue
            if (
                any(
                    name == word or name.endswith(f".{word}") or (word[-1] == "." and name.startswith(word))
                    for word in FORBIDDEN
                )
                and not safe_yaml
            ):
                found.append(f"{path.relative_to(ROOT)}: {name}")
            if words.get("allow_pickle", "False") != "False" or words.get("weights_only", "True") != "True":
                found.append(f"{path.relative_to(ROOT)}: {name} with {words}")
    assert found == []


# sources


def test_local_source(good, tmp_path):
    assert resolve_source(str(good)) == good
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.safetensors").touch()
    assert resolve_source(str(tmp_path / "exported")) == tmp_path / "exported" / "model.safetensors"
    for missing in (str(good) + "x", str(good.parent)):
        with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
            resolve_source(missing)


@pytest.fixture
def network(monkeypatch, tmp_path, good) -> list[str]:
    """Downloads deliver the file ``good``; the list collects their addresses."""
    downloads = []

    def download(url: str, destination: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        downloads.append(url)
        if hash_prefix and not sha256(good).startswith(hash_prefix):
            raise RuntimeError(f'invalid hash value (expected "{hash_prefix}", got "{sha256(good)}")')
        Path(destination).write_bytes(good.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return downloads


@pytest.mark.parametrize(
    "source",
    (
        "https://example.org/a.pth",
        "http://example.org/a.pth#sha256=" + 64 * "0",
        "ftp://example.org/a.pth#sha256=" + 64 * "0",
        "https://example.org/a.pth#sha256=123",
        "https://example.org/a.pth#sha256=" + 64 * "x",
        "https://example.org/a-" + 64 * "0" + ".pth",
    ),
)
def test_network_source_needs_https_and_checksum(network, source):
    with pytest.raises(ValueError, match="needs https and its checksum"):
        resolve_source(source)
    assert network == []


def test_network_source(network, good):
    source = f"https://example.org/a.pth#sha256={sha256(good).upper()}"
    path = resolve_source(source)
    assert load_checkpoint(path)["progress"] == {"global_step": 3}
    assert resolve_source(source) == path
    assert network == ["https://example.org/a.pth"]  # the second time it was there
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="does not have the checksum .* delete it"):
        resolve_source(source)


def test_network_source_with_other_content(network, tmp_path):
    with pytest.raises(
        CheckpointError, match="cannot download https://example.org/a.pth: invalid hash.* #sha256= is wrong"
    ):
        resolve_source("https://example.org/a.pth#sha256=" + 64 * "0")
    assert list((tmp_path / "home").rglob("*.pth")) == []


def test_network_source_without_a_network(network, monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(CheckpointError, match="no route to host.*; check the address, or fetch the file elsewhere"):
        resolve_source("https://example.org/a.pth#sha256=" + 64 * "0")


def test_first_nonfinite():
    assert first_nonfinite({"a": torch.ones(2), "n": torch.tensor(1)}) is None
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")]), "c": torch.tensor(float("nan"))}
    assert first_nonfinite(tensors) == "b"
