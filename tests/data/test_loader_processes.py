"""Worker processes: they survive the job's signals, never outlive it, and their failures give advice."""

import errno
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from data import build_dataset, build_train_loader
from data.loading.collate import collate
from data.loading.loader import ImageLoader, WorkerInit
from tests.builders import data_config
from tests.images import write_splits
from utils.errors import ImageReadError, RunError

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SCRIPT = """
import os, sys, torch
from data.loading.loader import ImageLoader

class Endless(torch.utils.data.Dataset):
    def __len__(self): return 100_000
    def __getitem__(self, index): return torch.zeros(3), os.getpid(), index

def main():
    loader = ImageLoader(Endless(), batch_size=4, num_workers=2)
    workers = set()
    for number, (_, pids, _) in enumerate(loader):
        workers |= set(pids.tolist())
        if number == 4:
            print(*workers, flush=True)
            {end}
main()
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("end", "code"),
    (
        ("raise RuntimeError('boom')", 1),
        ("os.kill(os.getpid(), 9)", -9),
    ),
)
def test_workers_end_with_their_process(end, code):
    """An exception keeps the loader alive until the exit, whose clean-up must not wait for workers that ignore it."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.format(end=end)],
        cwd=ROOT,
        timeout=100,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20  # orphans look for their parent every five seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(alive, pids))
    assert time.monotonic() - started < 60
    if code == 1:
        assert done.stderr.strip().endswith("RuntimeError: boom"), "noise after the error"


def test_workers_survive_signals_to_the_job(tmp_path):
    others = multiprocessing.active_children()
    config = data_config(DATA__DATA_PATH=write_splits(tmp_path, train=20), DATA__NUM_WORKERS=2)
    loader = build_train_loader(config, device="cpu")
    batches = iter(loader)
    next(batches)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker.pid, number)
    assert sum(1 for _ in batches) == len(loader) - 1
    assert all(worker.is_alive() for worker in workers)
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    assert sum(1 for _ in loader) == len(loader), "a closed loader must start again"
    loader.close()


def test_workers_of_every_start_method_give_the_same_batches(tmp_path):
    keys = {"DATA__DATA_PATH": write_splits(tmp_path), "DATA__BAD_IMAGES": "skip", "DATA__CACHE_DECODED": "ram"}
    dataset = build_dataset(data_config(**keys), is_train=True)
    batches = []
    for method in (None, "spawn"):
        loader = DataLoader(
            dataset,
            sampler=[(0, 1), (0, 2), (1, 3), (1, 4)],
            batch_size=2,
            collate_fn=collate,
            num_workers=1 if method else 0,
            multiprocessing_context=method,
            worker_init_fn=WorkerInit(1) if method else None,
        )
        batches.append(list(loader))
    assert all(torch.equal(a, b) for one, two in zip(*batches, strict=True) for a, b in zip(one, two, strict=True))


class Faulty(torch.utils.data.Dataset):
    """Its sample 5 kills its worker, or never comes."""

    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            self.fault()
        return torch.zeros(1), 0, index


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _hang():
    time.sleep(3600)


@pytest.mark.parametrize(("fault", "advice"), ((_die, "lack of memory.*DATA.NUM_WORKERS"), (_hang, "LOADER_TIMEOUT")))
def test_failures_of_workers_give_advice(fault, advice):
    others = multiprocessing.active_children()
    loader = ImageLoader(Faulty(fault), num_workers=1, timeout=0 if fault is _die else 2)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=f"(?s)DataLoader.*{advice}"):
        list(loader)
    assert time.monotonic() - started < 20
    assert not [child for child in multiprocessing.active_children() if child not in others]


def test_other_errors_pass_unchanged():
    def fail():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        list(ImageLoader(Faulty(fail), num_workers=0))


# --- what the workers need ---


@pytest.fixture
def config(tmp_path):
    return data_config(DATA__DATA_PATH=write_splits(tmp_path), DATA__NUM_WORKERS=2)


def refusal(config):
    """Return the message of the error that ends the first pass; nothing must be left running."""
    others = multiprocessing.active_children()
    with pytest.raises(RunError) as info:
        list(build_train_loader(config, device="cpu"))
    assert not [child for child in multiprocessing.active_children() if child not in others]
    assert "\n" not in str(info.value)
    return str(info.value)


def test_folder_too_long_for_sockets_is_found_before_the_first_batch(config, tmp_path, monkeypatch):
    long = tmp_path / ("job" * 30) / "tmp"
    long.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    started = time.monotonic()
    message = refusal(config)
    assert f"TMPDIR {str(long)!r}: AF_UNIX path too long" in message
    assert time.monotonic() - started < 5
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir")


def test_too_few_open_files_name_ulimit(config):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, hard))
    try:
        assert "ulimit -n" in refusal(config)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_are_not_the_image_s_fault(config, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    config = config.clone()
    config.defrost()
    config.DATA.BAD_IMAGES = "skip"
    monkeypatch.setattr("data.sources.listing._open_without_waiting", refuse)
    with pytest.raises(RunError, match="ulimit -n"):
        build_dataset(config, is_train=True)[0, 0]
    assert "ulimit -n" in refusal(config)


def test_full_shared_memory_names_shm_size(config, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse_tensor(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr("data.loading.loader.multiprocessing.Semaphore", refuse)
    assert "--shm-size" in refusal(config)
    monkeypatch.setattr("torch.Tensor.share_memory_", refuse_tensor)
    assert "--shm-size" in refusal(config)


def test_float_batches_of_workers_are_those_of_the_main_process(tmp_path):
    write_splits(tmp_path)
    batches = []
    for workers in (0, 2):
        keys = {"DATA__DATA_PATH": tmp_path, "DATA__PIPELINE": "reference", "DATA__NUM_WORKERS": workers}
        loader = build_train_loader(data_config(**keys), device="cpu")
        batches.append(list(loader))
        loader.close()
    assert batches[0][0][0].dtype == torch.float32
    assert all(torch.equal(a, b) for one, two in zip(*batches, strict=True) for a, b in zip(one, two, strict=True))


# --- errors of images ---


@pytest.mark.parametrize("workers", (0, 2))
def test_error_of_an_image_arrives_as_it_was_raised(tmp_path, workers):
    (write_splits(tmp_path) / "train" / "cat" / "0.jpg").write_bytes(b"broken")
    loader = build_train_loader(data_config(DATA__DATA_PATH=tmp_path, DATA__NUM_WORKERS=workers), device="cpu")
    with pytest.raises(ImageReadError) as info:
        list(itertools.chain(loader, loader, loader))  # each pass leaves some images out
    message = str(info.value)
    assert message.startswith(f"cannot read image {tmp_path}/train/cat/0.jpg (index 0, class 'cat'): ")
    assert message.endswith("DATA.BAD_IMAGES skip trains without them")
    assert "\n" not in message
    if workers:
        assert "Original Traceback" in str(info.value.__cause__), "the log keeps where in the worker it was raised"


class Failing(torch.utils.data.Dataset):
    """Raises an error."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, _index):
        raise self.error


@pytest.mark.parametrize("error", (ZeroDivisionError("one\ntwo"), OSError("no memory for a batch"), EOFError("end")))
def test_other_errors_of_workers_arrive_as_they_were_raised(error):
    with pytest.raises(type(error), match=f"^{error}$"):
        list(ImageLoader(Failing(error), num_workers=1))
