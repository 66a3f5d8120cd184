"""Non-finite losses and gradients: the update is skipped on all processes and leaves no trace.

The decision is made on the device and reaches the optimizer as its ``found_inf`` tensor, which the fused kernels read,
so that a healthy update never waits for the host; an optimizer without them (timm's) is only called after the host has
read the decision. BatchNorm's running statistics, which the forward pass has already
moved, are put back in the same way. A non-finite loss is turned into non-finite gradients (``poison_nonfinite``), which
the all-reduce of the gradients carries to every process: the gradient norm then tells all of them the same thing,
without a collective of its own.
"""

import logging
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.errors import NonFiniteError
from utils.training.batchnorm import BufferBackup, batchnorm_buffers
from utils.training.optimizer import is_fused

logger = logging.getLogger(__name__)


def poison_nonfinite(loss: Tensor) -> Tensor:
    """Return ``loss`` unchanged if it is finite, else one whose gradients are all NaN (its own might be zero)."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


class NonFiniteGuard:
    """Skips bad updates, counts them, and stops the run after too many in a row.

    Args:
        model: its BatchNorm buffers are protected.
        device: where loss and gradients live.
        limit: updates in a row after which ``check`` raises (``TRAIN.MAX_NONFINITE``).

    Attributes:
        reported: skipped updates as of the last ``check``.
        history: the records of the last ``2 * limit`` updates, as passed to ``begin``, with the loss and the gradient
            norm that came out, for the dump that ``tools/replay.py`` reads.
    """

    def __init__(self, model: nn.Module, device: torch.device, limit: int) -> None:
        self._backup = BufferBackup(list(batchnorm_buffers(model).values()))
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.limit = limit
        self.reported = 0
        self.history: deque[dict[str, Any]] = deque(maxlen=2 * limit)

    def begin(self, record: dict[str, Any]) -> None:
        """Prepare for an update; call this before its first forward pass, with what is needed to repeat it."""
        self._backup.save()
        self.history.append(record)

    @torch.no_grad()
    def step_unless_nonfinite(
        self, optimizer: Optimizer, scaler: torch.amp.GradScaler, grad_norm: Tensor, loss: Tensor | None = None
    ) -> Tensor:
        """Step the optimizer, or leave everything as it was if ``grad_norm`` is not finite.

        Args:
            optimizer: where it is fused, it sees the decision as ``found_inf``, else it is not called.
            scaler: its ``unscale_`` has been called on ``optimizer``; ``update`` is called here.
            grad_norm: norm of the unscaled gradients after the all-reduce, hence equal on all processes.
            loss: this process's loss, kept with the norm in the update's record.

        Returns:
            A boolean tensor on the device: whether the update was skipped.
        """
        self.history[-1].update(loss=loss, grad_norm=grad_norm)  # they stay on the device: no wait for their values
        bad = ~torch.isfinite(grad_norm)
        if is_fused(optimizer):
            optimizer.found_inf = bad.to(torch.float32)
            optimizer.step()
            del optimizer.found_inf
        elif not bad:  # waits for the device
            optimizer.step()
        scaler.update()
        self._backup.restore_where(bad)
        self._total += bad
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        return bad

    def check(self, position: str) -> int:
        """Read the counters (waits for the device), warn about new skips, and return the total so far.

        Args:
            position: place in the run, for messages.

        Raises:
            NonFiniteError: the last ``limit`` updates were all skipped; on all processes.
        """
        total, in_a_row = int(self._total), int(self._in_a_row)
        if total > self.reported:
            logger.warning(
                "%s: loss or gradient is not finite; %d update(s) skipped, %d so far, %d in a row",
                position,
                total - self.reported,
                total,
                in_a_row,
            )
            self.reported = total
        if in_a_row >= self.limit:
            raise NonFiniteError(
                f"{position}: loss or gradient was not finite in {in_a_row} updates in a row "
                f"(TRAIN.MAX_NONFINITE is {self.limit})"
            )
        return total

    def last_skipped(self) -> bool:
        """Return whether the newest update was skipped (waits for the device); the same on all processes.

        Such a state is not worth saving: rotation would delete a file from before the trouble to make room for it.
        """
        return int(self._in_a_row) > 0

    def state_dict(self) -> dict[str, int]:
        """Return the counters as plain integers."""
        return {"skipped": int(self._total), "in_a_row": int(self._in_a_row)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what ``state_dict`` returned."""
        self._total.fill_(state["skipped"])
        self._in_a_row.fill_(state["in_a_row"])
        self.reported = state["skipped"]
