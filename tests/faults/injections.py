"""Faults. Each function changes one thing in a process that is about to run main.py; `driver.py` calls them by name.

``step`` counts optimizer updates from 0: a fault at step 7 strikes when seven updates are done and the eighth begins.
"""

import copy
import errno
import json
import os
import resource
import signal
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

import main
from data.sources.base import FolderSource
from utils.checkpoint import dump, store
from utils.runtime import start as runtime


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _before_update(action) -> None:
    """Call ``action(state, session, group)`` when an update begins."""
    original = main.accumulate_gradients

    def accumulate_gradients(model, group, state, session):
        action(state, session, group)
        return original(model, group, state, session)

    main.accumulate_gradients = accumulate_gradients


def send(number: int, step: int, rank: int = 0, *, once: str = "", group: bool = False) -> None:
    """Send a signal to this process (``group``: and to its data workers) in the middle of an update.

    Args:
        number: the signal.
        step: at which update.
        rank: in which process.
        once: path of a file; the fault strikes only if it is absent, and makes it.
        group: send it to the process group.
    """

    def strike(state, session, _batches) -> None:
        if state.progress.global_step == step and session.run.rank == rank and not (once and Path(once).exists()):
            if once:
                Path(once).touch()
            (os.killpg if group else os.kill)(os.getpgid(0) if group else os.getpid(), number)

    _before_update(strike)


def hang(step: int, rank: int = 0) -> None:
    """Let a process stop working without ending."""

    def strike(state, session, _group) -> None:
        if state.progress.global_step == step and session.run.rank == rank:
            time.sleep(3600)

    _before_update(strike)


def slow_updates(seconds: float) -> None:
    """Make every update take longer."""
    _before_update(lambda *_: time.sleep(seconds))


def record_samples(folder: str) -> None:
    """Append every update's sample indices to ``folder/rank{r}.jsonl``."""

    def note(state, session, group) -> None:
        row = {
            "epoch": state.progress.epoch,
            "step": state.progress.global_step,
            "indices": [i for _, _, indices in group for i in indices.tolist()],
        }
        with open(Path(folder) / f"rank{session.run.rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    _before_update(note)


def bad_pixels(first: int, last: int, rank: int = 0, value: float = float("inf")) -> None:
    """Put ``value`` into one pixel of each batch of the updates ``first`` to ``last`` on one rank."""
    original = main.build_batch_transform

    def build_batch_transform(config, *, is_train, device, rank=0):
        transform = original(config, is_train=is_train, device=device, rank=rank)
        if not is_train or _rank() != chosen:
            return transform

        def spoil(images, targets, indices, *, epoch, update):
            images, targets = transform(images, targets, indices, epoch=epoch, update=update)
            if first <= update // max(1, config.TRAIN.ACCUMULATION_STEPS) <= last:
                images[0, 0, 0, 0] = value
            return images, targets

        spoil.mixes = transform.mixes
        return spoil

    chosen = rank
    main.build_batch_transform = build_batch_transform


def bad_scores() -> None:
    """Make the evaluation meet images that are not numbers."""
    original = main.build_batch_transform

    def build_batch_transform(config, *, is_train, device, rank=0):
        transform = original(config, is_train=is_train, device=device, rank=rank)
        if is_train:
            return transform
        return lambda images, targets, *_, **__: (torch.full(images.shape, float("nan")), targets)

    main.build_batch_transform = build_batch_transform


def signal_in_evaluation(number: int, epoch: int) -> None:
    """Send a signal to this process when the evaluation after an epoch (from 0) begins."""
    original = main.evaluate

    def evaluate(model, loader, **options):
        if signal_in_evaluation.count == epoch:
            os.kill(os.getpid(), number)
        signal_in_evaluation.count += 1
        return original(model, loader, **options)

    signal_in_evaluation.count = 0
    main.evaluate = evaluate


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
    original = main.capture

    def capture(state, facts):
        payload = original(state, facts)
        return payload if state.progress.global_step < step else {**payload, "extra": Unpicklable()}

    main.capture = capture


def full_disk(step: int, limit: int, *, entirely: bool = False) -> None:
    """Let no file grow beyond ``limit`` bytes from the checkpoint of a step on: the kernel refuses the write.

    ``entirely`` refuses status.json too.
    """
    original = store.write_checkpoint

    def refuse(path, _text) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def write_checkpoint(path, payload) -> None:
        if payload["progress"]["global_step"] >= step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if entirely:
                runtime.write_text_atomic = refuse
        original(path, payload)

    store.write_checkpoint = write_checkpoint


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


def stuck_storage(index: int) -> None:
    """Let the reading of an image never return."""
    _while_reading(index, lambda: time.sleep(3600))


def failing_start(rank: int, message: str) -> None:
    """Make one process fail while it builds its model."""
    original = main.build_model

    def build_model(config):
        if _rank() == rank:
            raise ValueError(message)
        return original(config)

    main.build_model = build_model


def report_memory(path: str) -> None:
    """Write to ``path`` by how many MiB the largest resident size grew over the run."""
    original = runtime.teardown_logging
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def teardown_logging() -> None:
        original()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        Path(path).write_text(f"{grown:.1f}")

    runtime.teardown_logging = teardown_logging


def kill_after_report(epoch: int) -> None:
    """SIGKILL when an epoch (from 1) has been reported and is about to be saved."""
    original = main.record_epoch

    def record_epoch(directory, row, result) -> None:
        original(directory, row, result)
        if row["epoch"] == epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    main.record_epoch = record_epoch


def dump_update(step: int) -> None:
    """Write the dump of a healthy update, to check that replaying repeats it to the last bit."""
    kept = {}

    def keep(state, session, _group) -> None:
        if state.progress.global_step == step:
            kept["payload"] = copy.deepcopy(main.capture(state, session.facts))

    def check_finite(state, session) -> None:
        if "payload" in kept:
            dump.capture = lambda *_: kept.pop("payload")
            dump.write_dump(state, session.facts, session.run.output_dir, session.loader.dataset.sample_name)

    _before_update(keep)
    main.check_finite = check_finite


def signal_at_start(number: int, rank: int = 0) -> None:
    """Send a signal to one process while it builds its model."""
    original = main.build_model

    def build_model(config):
        if _rank() == rank:
            os.kill(os.getpid(), number)
        return original(config)

    main.build_model = build_model
