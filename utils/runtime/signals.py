"""Requests to stop or to save: signals and clocks, agreed on by all processes at the same update.

A handler only sets a flag: no I/O, no logging and no collective happens inside it. The training loop asks
``poll`` once an update; all processes then leave at the same update and save together.
"""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from utils.runtime.distributed import is_distributed

JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a batch system or a terminal sends them to a job
_TIME_LIMIT = 1000  # beyond every signal number


class StopRequest:
    """Listens for SIGTERM, SIGINT and SIGUSR1 and watches the clock.

    The first signal asks for a clean stop. A second SIGINT (Ctrl-C again) is the ordinary KeyboardInterrupt.

    Args:
        max_minutes: minutes from now after which the run stops by itself; 0 for no limit.
        save_minutes: minutes after a save when the next one is due; 0 for never.

    Attributes:
        agreed: why the run shall stop, as of the last ``poll``, or ''.
        save_due: whether a save is due, as of the last ``poll``.
    """

    def __init__(self, max_minutes: float = 0.0, save_minutes: float = 0.0) -> None:
        self._code = 0
        self._save_seconds = 60.0 * save_minutes
        self._last_save = time.monotonic()
        self.save_due = False
        self._deadline = time.monotonic() + 60.0 * max_minutes if max_minutes > 0 else None
        self._previous = {}
        self.agreed = ""

    def __enter__(self) -> "StopRequest":
        for number in JOB_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._code == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self._code = max(self._code, number)

    def poll(self) -> str:
        """Return why the run shall stop, or ''. Collective: every process calls it and gets the same answers."""
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            self._code = _TIME_LIMIT
        code, save_due = self._code, self._save_seconds > 0 and now - self._last_save >= self._save_seconds
        if is_distributed() and dist.get_world_size() > 1:
            flags = torch.tensor([code, save_due], dtype=torch.int32)  # on the CPU (gloo): a GPU is not synchronised
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            code, save_due = flags.tolist()
        self.save_due = bool(save_due)
        if code == _TIME_LIMIT:
            self.agreed = "TRAIN.MAX_RUN_MINUTES reached"
        elif code:
            self.agreed = signal.Signals(code).name
        return self.agreed

    def saved(self) -> None:
        """Call after a save: the clock of ``save_due`` starts again."""
        self._last_save = time.monotonic()
        self.save_due = False
