"""Faults. Each function changes one thing in a process that is about to run main.py; ``driver.py`` calls them by name.

``step`` counts optimizer updates from 0: a fault at step 7 strikes when seven updates are done and the eighth begins.
What is patched are methods of classes, and functions that main.py itself defines: they are looked up when they are
called, whoever has imported them.
"""

import atexit
import copy
import dataclasses
import errno
import json
import os
import resource
import signal
import sys
import threading
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

import main
from data.sources.base import FolderSource
from utils import assembly
from utils.checkpoint import CheckpointStore, write_dump
from utils.runtime import Run
from utils.session import Session
from utils.training import NonFiniteGuard


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _before(owner: object, name: str, action) -> None:
    """Call ``action``, with the same arguments, before a method or a function of main.py."""
    original = getattr(owner, name)

    def patched(*args, **options):
        action(*args, **options)
        return original(*args, **options)

    setattr(owner, name, patched)


def _before_update(action) -> None:
    """Call ``action(record)`` when an update begins; the record has its step, epoch and sample indices."""
    _before(NonFiniteGuard, "begin", lambda _guard, record: action(record))


def send(number: int, step: int, rank: int = 0, *, once: str = "", group: bool = False) -> None:
    """Send a signal to this process (``group``: and to its data workers) in the middle of an update.

    Args:
        number: the signal.
        step: at which update.
        rank: in which process.
        once: path of a file; the fault strikes only if it is absent, and makes it.
        group: send it to the process group.
    """

    def strike(record) -> None:
        if record["step"] == step and _rank() == rank and not (once and Path(once).exists()):
            if once:
                Path(once).touch()
            (os.killpg if group else os.kill)(os.getpgid(0) if group else os.getpid(), number)

    _before_update(strike)


def hang(step: int, rank: int = 0) -> None:
    """Let a process stop working without ending."""

    def strike(record) -> None:
        if record["step"] == step and _rank() == rank:
            time.sleep(3600)

    _before_update(strike)


def slow_updates(seconds: float) -> None:
    """Make every update take longer."""
    _before_update(lambda _: time.sleep(seconds))


def record_samples(folder: str) -> None:
    """Append every update's sample indices to ``folder/rank{r}.jsonl``."""

    def note(record) -> None:
        indices = [index for micro in record["indices"] for index in micro.tolist()]
        row = {"epoch": record["epoch"], "step": record["step"], "indices": indices}
        with open(Path(folder) / f"rank{_rank()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    _before_update(note)


def _change_session(**changes) -> None:
    """Replace fields of the session that main.py builds: name -> function of the session that returns the new value."""
    original = main.build_session

    def build_session(*args, **options) -> Session:
        session = original(*args, **options)
        return dataclasses.replace(session, **{name: change(session) for name, change in changes.items()})

    main.build_session = build_session


def bad_pixels(first: int, last: int, rank: int = 0, value: float = float("inf")) -> None:
    """Put ``value`` into one pixel of each batch of the updates ``first`` to ``last`` on one rank."""

    def spoiled(session: Session):
        def transform(*batch, epoch, update):
            images, targets = session.transform(*batch, epoch=epoch, update=update)
            if first <= update // session.accumulation <= last and _rank() == rank:
                images[0, 0, 0, 0] = value
            return images, targets

        return transform

    _change_session(transform=spoiled)


def bad_scores() -> None:
    """Make the evaluation meet images that are not numbers."""

    def spoiled(_session: Session):
        return lambda images, targets, *_, **__: (torch.full(images.shape, float("nan")), targets)

    _change_session(val_transform=spoiled)


def signal_in_evaluation(number: int, epoch: int) -> None:
    """Send a signal to this process when the evaluation after an epoch (from 0) begins."""

    def strike(state, _session) -> None:
        if state.progress.epoch == epoch:
            os.kill(os.getpid(), number)

    _before(main, "validate", strike)


def _replace_save(step: int, write) -> None:
    """Let ``write(payload, file, original)`` write the checkpoints from a step on."""
    original = torch.save

    def save(payload: Any, file, **options) -> None:
        # torch also calls torch.save, to send tensors between processes
        if isinstance(payload, dict) and "progress" in payload and payload["progress"]["global_step"] >= step:
            write(payload, file, original)
        else:
            original(payload, file, **options)

    torch.save = save


def saves_complete() -> None:
    """Let training wait for every save, so that what a kill finds does not depend on speed."""
    original = CheckpointStore.save

    def save(store, *args, **options) -> Path:
        path = original(store, *args, **options)
        store.finish()
        return path

    CheckpointStore.save = save


def kill_in_write(step: int, number: int) -> None:
    """SIGKILL before file operation ``number`` (open, rename, link, remove) of the saves in the background.

    Those up to ``step`` do not count.
    """
    count, saving = 0, -1

    def note(_store, payload, _names=(), **_options) -> None:
        nonlocal saving
        saving = payload["progress"]["global_step"]

    def strike(event: str, _arguments: tuple) -> None:
        nonlocal count
        operation = event in ("open", "os.rename", "os.link", "os.remove")
        if operation and saving > step and "checkpoint" in threading.current_thread().name:
            count += 1
            if count > number:
                os.kill(os.getpid(), signal.SIGKILL)

    _before(CheckpointStore, "save", note)
    sys.addaudithook(strike)


def slow_save(seconds: float, signals: tuple[int, ...] = (), step: int = 0) -> None:
    """Write checkpoints in twenty pieces that take ``seconds`` together, from a step on.

    Between the pieces, ``signals`` come one by one to this process.
    """
    waiting = list(signals)

    def write(payload: Any, file, original) -> None:
        buffer = BytesIO()
        original(payload, buffer)
        data = buffer.getvalue()
        for start in range(0, len(data), len(data) // 20 + 1):
            file.write(data[start : start + len(data) // 20 + 1])
            file.flush()
            time.sleep(seconds / 20)
            if waiting:
                os.kill(os.getpid(), waiting.pop(0))

    _replace_save(step, write)


def failing_save(step: int, message: str) -> None:
    """Make torch.save raise from a step on, after it has written a part."""

    def write(payload: Any, file, original) -> None:
        file.write(b"x" * 1000)
        raise RuntimeError(message)

    _replace_save(step, write)


class Unpicklable:
    """An object that cannot be pickled."""

    def __reduce__(self):
        raise TypeError("this object cannot be pickled")


def unpicklable_entry(step: int) -> None:
    """Put an object that cannot be pickled into the checkpoints from a step on."""

    def spoil(_store, payload, _names=(), **_options) -> None:
        if payload["progress"]["global_step"] >= step:
            payload["extra"] = Unpicklable()

    _before(CheckpointStore, "save", spoil)


def full_disk(step: int, limit: int, *, entirely: bool = False) -> None:
    """Let no file of rank 0 grow beyond ``limit`` bytes from a step on: the kernel refuses the write.

    ``entirely`` refuses status.json too.
    """

    def refuse(run, *_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.output_dir / "status.json"))

    def fill(_store, payload, _names=(), **_options) -> None:
        if payload["progress"]["global_step"] >= step and _rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if entirely:
                Run.write_status = refuse

    _before(CheckpointStore, "save", fill)


def _while_reading(index: int, action) -> None:
    """Call ``action`` when image ``index`` of a folder is about to be read."""
    original = FolderSource.load

    def load(self, number):
        if number == index:
            action()
        return original(self, number)

    FolderSource.load = load


def killed_worker(index: int) -> None:
    """Kill the data worker that is to read an image, as the kernel does when memory runs out."""
    _while_reading(index, lambda: os.kill(os.getpid(), signal.SIGKILL))


def replaced_image(index: int, path: str) -> None:
    """Put a FIFO in the place of a file when image ``index`` is about to be read."""

    def replace() -> None:
        os.unlink(path)
        os.mkfifo(path)

    _while_reading(index, replace)


def stuck_storage(index: int) -> None:
    """Let the reading of an image never return."""
    _while_reading(index, lambda: time.sleep(3600))


def failing_start(rank: int, message: str) -> None:
    """Make one process fail while it builds its model."""

    def strike(_session) -> None:
        if _rank() == rank:
            raise ValueError(message)

    _before(main, "build_training", strike)


def signal_at_start(number: int, rank: int = 0) -> None:
    """Send a signal to one process while it builds its model."""

    def strike(_session) -> None:
        if _rank() == rank:
            os.kill(os.getpid(), number)

    _before(main, "build_training", strike)


def report_memory(path: str) -> None:
    """Write to ``path`` by how many MiB the largest resident size grew over the run."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def report() -> None:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        Path(path).write_text(f"{grown:.1f}")

    atexit.register(report)


def kill_after_report(epoch: int) -> None:
    """SIGKILL when an epoch (from 1) has been reported and is about to be saved."""

    def strike(_session, state, _names=(), **_options) -> None:
        if (state.progress.epoch, state.progress.samples_seen) == (epoch, 0):
            os.kill(os.getpid(), signal.SIGKILL)

    _before(Session, "save", strike)


def dump_update(step: int) -> None:
    """Write the dump of a healthy update, to check that replaying repeats it to the last bit."""
    kept = {}

    def act(session, state, _timer, **_options) -> None:
        if state.progress.global_step == step:  # the state that the update will meet
            kept["state"] = copy.deepcopy(state)
        elif state.progress.global_step == step + 1:
            kept["state"].guard.history = state.guard.history
            write_dump(kept["state"], session.metadata, session.run.output_dir, session.loader.dataset.sample_name)

    _before(Session, "after_update", act)


def room_for(images: int, rank: int) -> None:
    """Let trial updates of more than ``images`` images run out of memory on one rank."""
    original = assembly.try_updates

    def try_updates(config, **options) -> None:
        original(config, **options)
        if config.DATA.BATCH_SIZE > images and rank == _rank():
            raise torch.OutOfMemoryError("CUDA out of memory")

    assembly.try_updates = try_updates


def compile_with(backend: str) -> None:
    """Compile by another backend: one that generates no code, which takes minutes."""
    compile_in_place = torch.nn.Module.compile

    def compile_quickly(self: torch.nn.Module, *, mode: str = "default", **options: Any) -> None:
        compile_in_place(self, backend=backend, **options)

    torch.nn.Module.compile = compile_quickly
