"""The checkpoint files of one output folder: names, rotation, and which one a restart takes."""

import logging
import math
import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from utils.checkpoint.capture import host_copy
from utils.checkpoint.files import (
    first_nonfinite,
    link_checkpoint,
    load_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from utils.errors import CheckpointError
from utils.runtime import on_main_process, phase

logger = logging.getLogger(__name__)

LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"
_STEP = "checkpoint_step_{:09d}.pth"
_STEP_PATTERN = re.compile(r"checkpoint_step_(\d+)\.pth")
_NAMES = "names"  # entry of a checkpoint: under which names besides its step's it was saved
_EPOCH_PATTERN = re.compile(r"ckpt_epoch_(\d+)\.pth")
SLOW_SAVE_SECONDS = 20


class CheckpointStore:
    """The checkpoint files of one output folder.

    Every save writes ``checkpoint_step_NNNNNNNNN.pth``; ``checkpoint_last.pth``, ``checkpoint_best.pth`` and the
    milestones ``ckpt_epoch_N.pth`` are further names (hard links) of such files. Only the rolling step files are
    ever deleted, after a newer one is durable. One file is written at a time, by a thread of rank 0 where training goes
    on in the meantime.

    Args:
        directory: existing folder.
        keep: how many step files to keep (``TRAIN.SAVE_KEEP``).
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, payload: dict[str, Any], names: tuple[str, ...] = (), *, background: bool = False) -> Path:
        """Write ``payload`` under its step's name, ``checkpoint_last.pth`` and ``names``. Collective.

        Args:
            payload: what ``capture`` returned; it refers to the live state.
            names: further names of the file.
            background: return when ``payload`` is copied to the host's memory. It is written while training goes on;
                ``finish``, which every save begins with, waits for that and raises its error.

        Raises:
            CheckpointError, OSError: rank 0 could not write this or the previous file; on all processes. Earlier files
                are untouched.
        """
        path = self.directory / _STEP.format(payload["progress"]["global_step"])

        def begin() -> None:
            self._settle()
            if background:
                self._writing = self._executor.submit(self._write, path, host_copy(payload), names)
            else:
                self._write(path, payload, names)

        on_main_process(begin)
        return path

    @property
    def failed(self) -> bool:
        """Whether the write in the background has failed; ``finish`` raises its error."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def finish(self) -> None:
        """Wait until the file in the background is written. Collective.

        Raises:
            CheckpointError, OSError: it could not be written; on all processes.
        """
        on_main_process(self._settle)

    def close(self) -> None:
        """Wait for the file in the background; if it could not be written, log why. Not collective."""
        if self._writing is not None and not self._writing.done():
            logger.warning("the end waits until a checkpoint is written to %s", self.directory)
        try:
            self._settle()
        except (CheckpointError, OSError) as error:
            logger.error("%s", error)

    def _settle(self) -> None:
        if self._writing is not None:
            wait([self._writing])  # a signal may end this with an exception, and leaves the write to ``close``
            writing, self._writing = self._writing, None
            writing.result()

    @phase("saving")
    def _write(self, path: Path, payload: dict[str, Any], names: tuple[str, ...]) -> None:
        started = time.monotonic()
        _refuse_nonfinite(payload, path)
        write_checkpoint(path, {**payload, _NAMES: [LAST, *names]})
        for name in (LAST, *names):
            link_checkpoint(path, name)
        for old in self._step_files()[self.keep :]:
            old.unlink()
        seconds = time.monotonic() - started
        logger.info("saved %s (%.1f s)", ", ".join((path.name, *names)), seconds)
        if seconds > SLOW_SAVE_SECONDS:
            logger.warning(
                "saving took %.0f s; torchrun kills a stopping run after 30 s unless told otherwise "
                "(--shutdown-timeout), so write to a faster disk or ask for the stop earlier",
                seconds,
            )

    def newest(self) -> Path | None:
        """Return the path of the newest file that verifies, or None in a folder without checkpoints. Collective.

        Every file says under which names it was saved. A kill can come before it has them all: what is missing is
        made good here, so that the best that the run believes in is there.

        Raises:
            CheckpointError: there are checkpoints, but none is good: nothing may silently start from zero here.
        """
        return on_main_process(self._choose)

    def latest_step(self) -> int:
        """Return the largest number in the names of the step files that this process sees, or -1."""
        files = self._step_files() if self.directory.is_dir() else []
        return _number(files[0], _STEP_PATTERN) if files else -1

    def set_aside_beyond(self, step: int) -> None:
        """Rename the files of updates after ``step``, where the run goes on, to ``NAME.aside``. Collective.

        They are damaged, or the run has gone back to an earlier file. Left in place they would count as the newest:
        rotation would delete what this run writes instead, and the next restart would continue from them.

        Raises:
            CheckpointError: a file could not be renamed; on all processes.
        """
        on_main_process(lambda: self._set_aside(self._later_than(step), step))

    def _later_than(self, step: int) -> list[Path]:
        """Return the files of updates after ``step``, and ``checkpoint_last.pth`` if it is one or cannot be read."""
        kept = [path for path in self._step_files() if _number(path, _STEP_PATTERN) <= step]
        later = [path for path in self._step_files() if path not in kept]
        last = self.directory / LAST
        if last.exists() and not any(last.samefile(path) for path in kept) and step_inside(last) > step:
            later.append(last)
        return later

    def _set_aside(self, paths: list[Path], step: int) -> None:
        try:
            for path in paths:
                os.replace(path, path.with_name(f"{path.name}.aside"))
        except OSError as error:
            raise CheckpointError(f"cannot set a checkpoint aside: {error}") from error
        if paths:
            logger.warning(
                "the run goes on from update %d; later files are damaged or no longer part of it and get the ending "
                ".aside: %s",
                step,
                ", ".join(path.name for path in paths),
            )

    def _choose(self) -> Path | None:
        reasons = []
        for path in self._candidates():
            try:
                payload = verify_checkpoint(path)
                if "progress" not in payload:
                    raise CheckpointError(f"{path} has no training state")
            except CheckpointError as error:
                logger.warning("passed over: %s", error)
                reasons.append(f"  {error}")
            else:
                self._repair_names(path, payload)
                return path
        if reasons:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is usable, and starting from zero would hide that:\n"
                + "\n".join(reasons)
                + "\n  move them away to start over, or name a good file with --resume"
            )
        return None

    def _repair_names(self, path: Path, payload: dict[str, Any]) -> None:
        """Give a file the names under which it was saved, where they are missing or another file's."""
        names, step = payload.get(_NAMES, []), step_inside(path)
        for name in names if isinstance(names, list) else []:
            known = isinstance(name, str) and (name in (LAST, BEST) or _EPOCH_PATTERN.fullmatch(name))
            target = self.directory / name if known else path
            if target.exists() and (target.samefile(path) or step_inside(target) == step):
                continue
            if step_inside(target) > step:
                self._set_aside([target], step)
            logger.warning("%s was saved as %s too, and gets that name again", path.name, name)
            link_checkpoint(path, name)

    def _candidates(self) -> list[Path]:
        """Return the files to try, newest first by the number in the name, never by the time of change."""
        others = [self.directory / LAST, *self._numbered(_EPOCH_PATTERN), self.directory / BEST]
        return self._step_files() + [path for path in others if path.exists()]

    def _step_files(self) -> list[Path]:
        """Return the rolling files, newest first."""
        return self._numbered(_STEP_PATTERN)

    def _numbered(self, pattern: re.Pattern) -> list[Path]:
        matching = [path for path in self.directory.iterdir() if pattern.fullmatch(path.name)]
        return sorted(matching, key=lambda path: _number(path, pattern), reverse=True)


def _number(path: Path, pattern: re.Pattern) -> int:
    return int(pattern.fullmatch(path.name)[1])


def step_inside(path: Path) -> float:
    """Return the update that a checkpoint holds; -inf if there is no such file, inf if it cannot be read."""
    if not path.exists():
        return -math.inf
    try:
        step = load_checkpoint(path, map_location="meta")["progress"]["global_step"]
    except (CheckpointError, KeyError, TypeError):
        return math.inf
    return step if type(step) is int else math.inf


def _refuse_nonfinite(payload: dict[str, Any], path: Path) -> None:
    for kind in ("model", "ema"):
        bad = first_nonfinite(payload[kind] or {})
        if bad is not None:
            raise CheckpointError(f"{path} is not written: {kind} entry {bad!r} has infinite or undefined values")
