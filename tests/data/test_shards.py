"""Shards: packed alike by any number of processes, read like their folder, from a disk or a server; damage is named."""

import copy
import functools
import http.server
import json
import logging
import multiprocessing
import os
import shutil
import tarfile
import threading
import time

import numpy as np
import pytest
import torch

from data import ShardSource, build_dataset, build_train_loader, check_data, is_shard_set
from data.sources import ranges
from data.sources.base import FolderSource
from tests.builders import data_config
from tests.images import picture, write_splits
from tests.tiny_run import TinyRun
from tools import check_data as check_tool
from tools import pack
from utils.checkpoint.files import load_checkpoint
from utils.errors import ImageReadError, RunError

MEGABYTE = 1_000_000


def pack_all(folder, out, *words):
    """Pack with shards of 1 MB, the smallest; return the exit status."""
    return pack.command([str(folder), str(out), "--shard-size", "1", "--workers", "1", *map(str, words)])


def write_set(folder):
    """Write train/ and val/ with larger images too, so that train takes two shards."""
    write_splits(folder, train=3, val=2)
    for name in ("cat", "emu"):
        picture(7, (500, 700)).save(folder / "train" / name / "large.png")
    (folder / "train" / "dog" / "no_ending").write_bytes((folder / "train" / "dog" / "0.jpg").read_bytes())
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Folder with the images in ``folder`` and their shards in ``shards``; not to be changed."""
    root = tmp_path_factory.mktemp("packed")
    assert pack_all(write_set(root / "folder"), root / "shards") == 0
    return root


@pytest.fixture
def copied(packed, tmp_path):
    """A copy of the shards, to be changed."""
    return shutil.copytree(packed / "shards", tmp_path / "shards")


def config_of(where, dataset="shards", **keys):
    return data_config(DATA__DATASET=dataset, DATA__DATA_PATH=where, **keys)


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- packing ---


def test_any_number_of_processes_packs_the_same_bytes(packed, tmp_path):
    assert pack_all(packed / "folder", tmp_path / "again", "--workers", 3) == 0
    assert files_of(tmp_path / "again") == files_of(packed / "shards")
    assert sorted(files_of(packed / "shards" / "train")) == [
        "index.json",
        "samples.npz",
        "shard-000000.tar",
        "shard-000001.tar",
    ]


@pytest.mark.parametrize("part", ("train", "val"))
def test_shards_hold_the_files_of_the_folder(packed, part):
    source = ShardSource(packed / "shards" / part, as_array=True)
    folder = FolderSource(packed / "folder" / part, as_array=True)
    assert source.classes == folder.classes
    assert source.targets.tolist() == folder.targets.tolist()
    for index in range(len(folder.targets)):
        assert source.read(index) == folder.read(index)
        assert np.array_equal(source.load(index), folder.load(index))
        assert source.name(index).endswith(".tar@/" + folder.name(index).removeprefix(f"{folder.root}/"))


def test_webdataset_reads_the_shards(packed):
    webdataset = pytest.importorskip("webdataset")
    shards = [str(packed / "shards" / "train" / f"shard-00000{number}.tar") for number in range(2)]
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("jpg;png", "cls"))
    source = ShardSource(packed / "shards" / "train", as_array=True)
    assert [label for _, label in found] == source.targets.tolist()
    assert all(np.array_equal(image, np.asarray(source.load(index))) for index, (image, _) in enumerate(found))


def test_validation_images_are_numbered_by_the_classes_of_training(packed, tmp_path):
    shutil.copytree(packed / "folder", tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder" / "val" / "dog")
    assert pack_all(tmp_path / "folder", tmp_path / "out", "--parts", "val") == 0
    source = ShardSource(tmp_path / "out" / "val", as_array=True)
    assert source.classes == ["cat", "dog", "emu"]
    assert source.targets.tolist() == [0, 0, 2, 2]


def test_resized_images_have_the_shorter_side_and_small_ones_stay(packed, tmp_path):
    assert pack_all(packed / "folder", tmp_path / "out", "--resize", 100, "--quality", 80) == 0
    source = ShardSource(tmp_path / "out" / "train", as_array=False)
    folder = FolderSource(packed / "folder" / "train", as_array=False)
    large = [index for index in range(len(folder.targets)) if folder.name(index).endswith("large.png")]
    assert [source.load(index).size for index in large] == [(140, 100)] * 2
    assert all(source.read(i) == folder.read(i) for i in range(len(folder.targets)) if i not in large)
    with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as tar:
        assert f"{large[0]:09d}.jpg" in tar.getnames()


def test_images_that_cannot_be_read_are_all_named(packed, tmp_path, capsys):
    folder = shutil.copytree(packed / "folder", tmp_path / "folder")
    (folder / "train" / "cat" / "0.jpg").write_bytes(b"")
    (folder / "train" / "emu" / "large.png").write_bytes(b"<html>")
    assert pack_all(folder, tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert f"bad: {folder}/train/cat/0.jpg: the file is empty" in out
    assert f"bad: {folder}/train/emu/large.png: not an image of a known format" in out
    assert not (tmp_path / "out" / "train" / "index.json").exists()
    assert (tmp_path / "out" / "val" / "index.json").exists()
    for name in ("cat/0.jpg", "emu/large.png"):
        shutil.copy2(packed / "folder" / "train" / name, folder / "train" / name)
    assert pack_all(folder, tmp_path / "out") == 0
    assert files_of(tmp_path / "out") == files_of(packed / "shards")


def test_interrupted_packing_goes_on_where_it_was(packed, tmp_path, monkeypatch):
    write_shard, written = pack._write_shard, []

    def interrupted(folder, plan, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(plan.name)
        return write_shard(folder, plan, *rest)

    monkeypatch.setattr(pack, "_write_shard", interrupted)
    assert pack_all(packed / "folder", tmp_path / "out", "--parts", "train") == 130
    assert not is_shard_set(tmp_path / "out" / "train")
    first = (tmp_path / "out" / "train" / "shard-000000.tar").stat()
    monkeypatch.setattr(pack, "_write_shard", write_shard)
    assert pack_all(packed / "folder", tmp_path / "out", "--parts", "train") == 0
    assert files_of(tmp_path / "out" / "train") == files_of(packed / "shards" / "train")
    assert (tmp_path / "out" / "train" / "shard-000000.tar").stat().st_ino == first.st_ino, "it was kept"


def test_folders_that_hold_something_else_stay_as_they_are(packed, tmp_path):
    with pytest.raises(ValueError, match="holds other files such as 'cat'"):
        pack_all(packed / "folder", packed / "folder")
    before = files_of(packed / "shards")
    with pytest.raises(ValueError, match="other images, or one packed with other options"):
        pack_all(packed / "folder", packed / "shards", "--resize", 100)
    assert pack_all(packed / "folder", packed / "shards") == 0
    assert files_of(packed / "shards") == before
    with pytest.raises(ValueError, match="neither train/ nor val/"):
        pack_all(packed / "folder" / "train", tmp_path / "out")
    with pytest.raises(SystemExit):
        pack_all(packed / "folder", tmp_path / "out", "--quality", 80)


# --- training ---


def batches(config):
    """Return the batches of epochs 0 and 1 of two data workers, the first epoch from its fourth sample."""
    loader = build_train_loader(config, device="cpu")
    found = []
    for epoch, start in ((0, 4), (1, 0)):
        loader.sampler.set_progress(epoch, start)
        found += [tuple(part.clone() for part in batch) for batch in loader]
    loader.close()
    return found


def same(ours, theirs):
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", (0, 2))
def test_batches_are_those_of_the_folder_bit_for_bit(packed, workers):
    keys = {"DATA__NUM_WORKERS": workers}
    ours = batches(config_of(packed / "shards", **keys))
    theirs = batches(config_of(packed / "folder", "folder"))
    assert len(ours) == len(theirs) == 5
    assert all(same(*pair) for pair in zip(ours, theirs, strict=True))


def test_fingerprint_depends_on_the_images_alone(packed, copied, tmp_path):
    def fingerprint(folder):
        return ShardSource(folder / "train", as_array=True).fingerprint()

    assert fingerprint(copied) == fingerprint(packed / "shards")
    folder = shutil.copytree(packed / "folder", tmp_path / "folder")
    file = folder / "train" / "cat" / "0.jpg"
    file.write_bytes((folder / "train" / "dog" / "0.jpg").read_bytes())
    assert pack_all(folder, tmp_path / "other") == 0
    assert fingerprint(tmp_path / "other") != fingerprint(packed / "shards")


def _load_all(source, results):
    results.put([int(np.asarray(source.load(index)).sum()) for index in range(len(source.targets))])


def in_processes(source):
    """Return what two forked processes and a copy read at the same time, and this process."""
    expected = [int(np.asarray(source.load(index)).sum()) for index in range(len(source.targets))]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_load_all, args=(source, results)) for _ in range(2)]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    twin = copy.deepcopy(source)  # as a spawned process gets it
    return [*found, [int(np.asarray(twin.load(index)).sum()) for index in range(len(source.targets))]], expected


def test_processes_read_at_the_same_time(packed, monkeypatch):
    found, expected = in_processes(ShardSource(packed / "shards" / "train", as_array=True))
    assert found == [expected] * 3
    monkeypatch.setattr(ranges, "_KEPT_FILES", 1)
    found, again = in_processes(ShardSource(packed / "shards" / "train", as_array=True))
    assert found == [again] * 3 == [expected] * 3


def result_of(folder):
    """Return weights and losses of a finished run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_checkpoint(folder / "checkpoint_last.pth")["model"], [
        (row["step"], row["train_loss"], row["val_loss"], row["grad_norm"]) for row in rows
    ]


def test_a_run_goes_on_from_the_shards_of_its_folder_to_the_same_bits(tmp_path):
    run = TinyRun(tmp_path)
    assert pack_all(run.data, tmp_path / "shards") == 0
    first = run.train("--opts", "SAVE_FREQ", 1, tag="folder")
    words = ["--resume", first / "ckpt_epoch_1.pth", "--allow-change", "DATA.DATASET"]
    second = run.train("--dataset", "shards", "--data-path", tmp_path / "shards", *words, tag="shards")
    (weights, losses), (found, rows) = result_of(first), result_of(second)
    assert rows == losses[1:]
    assert all(torch.equal(found[name], weights[name]) for name in weights)


# --- damage ---


def test_missing_and_truncated_shards_are_named_before_training(copied):
    with open(copied / "train" / "shard-000001.tar", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"1 shards of another size .*shard-000001.tar: 5000 bytes instead of \d+"):
        build_dataset(config_of(copied), is_train=True)
    (copied / "train" / "shard-000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of its 2 shards: 'shard-000000.tar'"):
        build_dataset(config_of(copied), is_train=True)


def flip_a_bit(folder, index):
    source = ShardSource(folder, as_array=True)
    offset = int(source._columns["offset"][index])
    with open(folder / "shard-000000.tar", "r+b") as file:
        file.seek(offset + 700)
        byte = file.read(1)[0]
        file.seek(offset + 700)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_an_error_that_names_shard_and_image(copied, tmp_path, capsys, caplog):
    flip_a_bit(copied / "train", 1)
    dataset = build_dataset(config_of(copied), is_train=True)
    with pytest.raises(ImageReadError, match=r"train/shard-000000.tar@/cat/1.jpg \(index 1.*checksum"):
        dataset[0, 1]
    skipping = build_dataset(config_of(copied, DATA__BAD_IMAGES="skip"), is_train=True)
    with caplog.at_level(logging.WARNING):
        assert skipping[0, 1][2] != 1
    assert "skipped" in caplog.text
    assert check_tool.main([str(copied), "--output", str(tmp_path / "bad.txt"), "--workers", "2"]) == 1
    assert (tmp_path / "bad.txt").read_text().startswith(f"{copied}/train/shard-000000.tar@/cat/1.jpg\tthe shard is")
    assert "18 images: 1 bad" in capsys.readouterr().out


@pytest.mark.parametrize("change", (os.unlink, lambda file: os.truncate(file, 600)))
def test_a_shard_that_vanishes_stops_the_run_whatever_becomes_of_bad_images(copied, change):
    dataset = build_dataset(config_of(copied, DATA__BAD_IMAGES="skip"), is_train=True)
    change(copied / "train" / "shard-000000.tar")
    with pytest.raises(
        RunError, match=r"train/shard-000000.tar cannot be read: (No such file|it is shorter than it was)"
    ):
        dataset[0, 1]


def edit_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda index: index.update(format=2), "its format is 2, known is 1"),
        (lambda index: index["shards"][0].update(name="../shard-000000.tar"), "another folder"),
        (lambda index: index.pop("samples"), "not the index of a set of shards"),
        (lambda index: index["samples"].update(sha256="0" * 64), "samples.npz is damaged, or belongs to another"),
        (lambda index: index["shards"].pop(), "do not fit each other"),
    ),
)
def test_an_index_that_cannot_be_used_is_refused(copied, change, message):
    edit_index(copied / "train", change)
    with pytest.raises(ValueError, match=message) as info:
        build_dataset(config_of(copied), is_train=True)
    assert str(copied / "train") in str(info.value)


def test_the_other_layout_is_named(packed):
    with pytest.raises(FileNotFoundError, match="use --dataset folder"):
        build_dataset(config_of(packed / "folder"), is_train=True)
    with pytest.raises(FileNotFoundError, match="use --dataset shards"):
        build_dataset(config_of(packed / "shards", "folder"), is_train=True)


def test_check_data_accepts_shards(packed):
    config = config_of(packed / "shards")
    check_data(config, build_dataset(config, is_train=True), build_dataset(config, is_train=False))


# --- over HTTP ---


class Handler(http.server.SimpleHTTPRequestHandler):
    """A file server that answers Range requests, and fails as it is told to."""

    protocol_version = "HTTP/1.1"
    ranged = True
    failures: list = []  # statuses to answer, or 0 to close the connection
    moved = False

    def do_GET(self):
        self.server.connections.add(self.client_address)
        if self.failures:
            status = self.failures.pop(0)
            if not status:
                self.close_connection = True
                return
            self.send_error(status)
            return
        if self.moved and not self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/moved" + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = self.translate_path(self.path.removeprefix("/moved"))
        if not os.path.isfile(path):
            self.send_error(404)
            return
        with open(path, "rb") as file:
            data = file.read()
        wanted = self.headers.get("Range") if self.ranged else None
        self.send_response(206 if wanted else 200)
        if wanted:
            start, end = map(int, wanted.removeprefix("bytes=").split("-"))
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            data = data[start : end + 1]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(packed, monkeypatch):
    """Start a server of the shards; returns its address and its handler. What is tried again waits for nothing."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    servers = []

    def start(**attributes):
        handler = type("TheHandler", (Handler,), {"failures": [], **attributes})
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(handler, directory=str(packed / "shards"))
        )
        server.connections = set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", handler, server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_batches_over_http_are_those_of_the_folder(packed, serve):
    address, _, _ = serve()
    ours = batches(config_of(address, DATA__NUM_WORKERS=2))
    theirs = batches(config_of(packed / "folder", "folder"))
    assert all(same(*pair) for pair in zip(ours, theirs, strict=True))


def test_each_process_has_one_connection_of_its_own(packed, serve):
    address, _, server = serve()
    found, expected = in_processes(ShardSource(f"{address}/train", as_array=True))
    assert found == [expected] * 3
    assert len(server.connections) == 4, "this process, its copy of the source, and two more"


def test_what_passes_is_tried_again(packed, serve):
    address, handler, _ = serve()
    source = ShardSource(f"{address}/train?token=secret", as_array=True)
    handler.failures += [503, 0, 429]
    assert source.read(2) == ShardSource(packed / "shards" / "train", as_array=True).read(2)
    assert source.name(2) == f"{address}/train/shard-000000.tar@/cat/2.jpg", "without the token"
    handler.failures += [500] * 20
    with pytest.raises(RunError, match=rf"{address}/train/shard-000000.tar cannot be read: .*500.*after 7 attempts"):
        source.read(2)


def test_redirections_are_followed(packed, serve):
    address, _, _ = serve(moved=True)
    source = ShardSource(f"{address}/train/", as_array=True)
    assert source.read(4) == ShardSource(packed / "shards" / "train", as_array=True).read(4)


def test_errors_of_servers_say_what_is_wrong(serve):
    address, _, _ = serve(ranged=False)
    with pytest.raises(RunError, match="shard-000000.tar cannot be read: the server ignores Range requests"):
        build_dataset(config_of(address), is_train=True)
    with pytest.raises(FileNotFoundError, match="/none/train/index.json is not there"):
        build_dataset(config_of(f"{address}/none"), is_train=True)
    address, handler, server = serve()
    handler.failures.append(403)
    with pytest.raises(RunError, match="train/index.json cannot be read: the server answers 403 Forbidden$"):
        build_dataset(config_of(address), is_train=True)
    source = ShardSource(f"{address}/train", as_array=True)
    server.shutdown()
    server.server_close()
    with pytest.raises(RunError, match="shard-000000.tar cannot be read: .*after 7 attempts"):
        copy.deepcopy(source).read(0)


def test_the_check_tool_reads_addresses(serve, tmp_path, capsys):
    address, _, _ = serve()
    assert check_tool.main([address, "--output", str(tmp_path / "bad.txt"), "--workers", "1"]) == 0
    assert "18 images: 0 bad" in capsys.readouterr().out
