"""Requests to stop or to save: signals and clocks, agreed on by all processes at the same update.

While the run starts there is nothing to save, and a signal ends it at once. While it trains, the handler only sets a
flag: no logging and no collective happens inside it. The training loop asks ``poll`` once per update; all processes
then leave at the same update and save together.
"""

import contextlib
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from utils.runtime.distributed import is_distributed, is_main_process

# A batch system or a terminal sends them to a job.
JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_TIME_LIMIT = 1000  # larger than every signal number


class Interrupted(KeyboardInterrupt):
    """A signal ends the program before there is anything to save.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Listens for SIGTERM, SIGINT, SIGUSR1 and SIGHUP and watches the clock.

    Until ``begin_training`` is called, a signal raises ``Interrupted`` wherever the program is. After that, the first
    signal asks for a clean stop, and a second SIGINT (Ctrl-C again) raises the ordinary KeyboardInterrupt. SIGHUP stays
    ignored where it was ignored at the start (``nohup``).

    Args:
        max_minutes: minutes from now after which the run stops by itself; 0 for no limit.
        save_minutes: minutes from one save to the next; 0 for no saves by the clock.

    Attributes:
        started: when the run began, by ``time.monotonic``.
        agreed: why the run is to stop, as of the last ``poll``, or ''.
        exit_code: what the run's process ends with, as of the last ``poll``.
        save_due: whether a save is due, as of the last ``poll``.
        failed: whether a process passed ``failed`` to the last ``poll``.
    """

    def __init__(self, max_minutes: float = 0.0, save_minutes: float = 0.0) -> None:
        self._code = 0
        self._training = False
        self._save_seconds = 60.0 * save_minutes
        self.started = self._last_save = time.monotonic()
        self.save_due = self.failed = False
        self._deadline = self.started + 60.0 * max_minutes if max_minutes > 0 else None
        self._previous: dict[int, Any] = {}
        self.agreed = ""
        self.exit_code = 0

    def __enter__(self) -> "StopRequest":
        for number in JOB_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def begin_training(self) -> None:
        """Let signals wait for the end of an update from here on."""
        self._training = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._training and not self._code:
            self._code = number
            raise Interrupted(number)
        if number == signal.SIGINT and self._code == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if not self._code and is_main_process():
            _say(number)
        self._code = max(self._code, number)

    def poll(self, *, failed: bool = False) -> str:
        """Return why the run is to stop, or ''. Collective: every process calls it and gets the same answer.

        Args:
            failed: what this process does beside the training has failed; the others learn of it by ``self.failed``.
        """
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            self._code = _TIME_LIMIT
        code, save_due = self._code, self._save_seconds > 0 and now - self._last_save >= self._save_seconds
        if is_distributed() and dist.get_world_size() > 1:
            # on the CPU (gloo): a GPU is not synchronised
            flags = torch.tensor([code, save_due, failed], dtype=torch.int32)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            code, save_due, failed = flags.tolist()
        self.save_due, self.failed = bool(save_due), bool(failed)
        if code == _TIME_LIMIT:
            self.agreed, self.exit_code = "TRAIN.MAX_RUN_MINUTES reached", 0
        elif code:
            self.agreed, self.exit_code = signal.Signals(code).name, signal_exit_code(code)
        return self.agreed

    def saved(self) -> None:
        """Restart the clock of ``save_due``; call this after every save."""
        self._last_save = time.monotonic()
        self.save_due = False


def signal_exit_code(number: int) -> int:
    """Return the exit code of a run that a signal has ended in good order: 128 + its number, as shells have it.

    Under torchrun it is 0: any other code counts as a failure there, and ``--max-restarts`` would start the run again.
    """
    return 0 if dist.is_torchelastic_launched() else 128 + number


def _say(number: int) -> None:
    """Tell the user at once that a signal was heard. The log, with its locks, is out of reach inside a handler."""
    again = "; Ctrl-C again ends it without saving" if number == signal.SIGINT else ""
    text = f"{signal.Signals(number).name}: stop requested, the run saves and ends after this update{again}\n"
    with contextlib.suppress(OSError):  # the terminal may be gone, which is what SIGHUP says
        os.write(sys.__stderr__.fileno(), text.encode())
