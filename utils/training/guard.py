"""Non-finite losses and gradients: the update is skipped on all processes and leaves no trace.

The decision is taken on the device and reaches the optimizer as its ``found_inf`` tensor (the fused kernels read
it), so that a healthy step never waits for the host. BatchNorm's running statistics, which the forward pass has
already moved, are put back in the same way. A non-finite loss is turned into non-finite gradients
(``poison_nonfinite``), which the gradient all-reduce carries to every process: the gradient norm then tells all of
them the same thing, without a collective of its own.
"""

import logging
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.errors import NonFiniteError
from utils.training.batchnorm import BufferBackup, batchnorm_buffers

logger = logging.getLogger(__name__)


def poison_nonfinite(loss: Tensor) -> Tensor:
    """Return ``loss`` unchanged if finite, else a loss whose gradients are all NaN (an infinite one may have zeros)."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


class NonFiniteGuard:
    """Skips bad updates, counts them, and stops the run after too many in a row.

    Args:
        model: its BatchNorm buffers are protected.
        device: where loss and gradients live.
        limit: updates in a row after which ``check`` raises (``TRAIN.MAX_NONFINITE``).

    Attributes:
        history: the last ``2 * limit`` updates' records, as passed to ``begin``, for the dump that
            ``tools/replay.py`` reads, with the loss and the gradient norm that came out.
    """

    def __init__(self, model: nn.Module, device: torch.device, limit: int) -> None:
        self._backup = BufferBackup(list(batchnorm_buffers(model).values()))
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.limit = limit
        self.reported = 0
        self.history: deque[dict[str, Any]] = deque(maxlen=2 * limit)

    def begin(self, record: dict[str, Any]) -> None:
        """Call before the first forward pass of an update, with what is needed to repeat it."""
        self._backup.save()
        self.history.append(record)

    @torch.no_grad()
    def finish(
        self, optimizer: Optimizer, scaler: torch.amp.GradScaler, grad_norm: Tensor, loss: Tensor | None = None
    ) -> Tensor:
        """Step the optimizer, or leave everything as it was if ``grad_norm`` is not finite.

        Args:
            optimizer: a fused optimizer; it sees the decision as ``found_inf``.
            scaler: its ``unscale_`` has been called on ``optimizer``; ``update`` is called here.
            grad_norm: norm of the unscaled gradients after the all-reduce, hence equal on all processes.
            loss: this process's loss, remembered with the norm in the update's record.

        Returns:
            A boolean tensor on the device: whether the update was skipped.
        """
        self.history[-1].update(loss=loss, grad_norm=grad_norm)  # on the device: nobody waits for them here
        bad = ~torch.isfinite(grad_norm)
        optimizer.found_inf = bad.to(torch.float32)
        optimizer.step()
        del optimizer.found_inf
        scaler.update()
        self._backup.restore_where(bad)
        self._total += bad
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        return bad

    def check(self, where: str) -> int:
        """Read the counters (waits for the device), warn about new skips, and return the total so far.

        Raises:
            NonFiniteError: the last ``limit`` updates were all skipped; every process raises alike.
        """
        total, in_a_row = int(self._total), int(self._in_a_row)
        if total > self.reported:
            logger.warning(
                "%s: loss or gradient is not finite; %d update(s) skipped, %d so far, %d in a row",
                where,
                total - self.reported,
                total,
                in_a_row,
            )
            self.reported = total
        if in_a_row >= self.limit:
            raise NonFiniteError(
                f"{where}: loss or gradient was not finite in {in_a_row} updates in a row "
                f"(TRAIN.MAX_NONFINITE is {self.limit})"
            )
        return total

    def last_skipped(self) -> bool:
        """Whether the newest update was skipped (waits for the device); the same on all processes.

        Such a state is not worth saving: rotation would give up files from before the trouble for it.
        """
        return int(self._in_a_row) > 0

    def state_dict(self) -> dict[str, int]:
        """Counters, as plain integers."""
        return {"skipped": int(self._total), "in_a_row": int(self._in_a_row)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what ``state_dict`` returned."""
        self._total.fill_(state["skipped"])
        self._in_a_row.fill_(state["in_a_row"])
        self.reported = state["skipped"]
