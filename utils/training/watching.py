"""What can be watched while a run goes on: the first batch as a picture, and TensorBoard or Weights & Biases."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.runtime import atomic_file, streams_restored
from utils.training.pictures import draw_batch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class Watcher:
    """Sends a run's figures to a logger. Nothing that fails in here stops the run: it is logged once.

    Weights & Biases gets what is written for TensorBoard (its ``wandb.tensorboard.patch``).

    Args:
        kind: LOGGER of the configuration: 'none', 'tensorboard' or 'wandb'.
        folder: output folder; the event files go into ``tensorboard`` inside.
        is_main: whether this process writes; the others do nothing.
    """

    def __init__(self, kind: str, folder: Path, *, is_main: bool) -> None:
        self._kind = kind if is_main else "none"
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._probabilities: list[Tensor] = []
        self.picture_due = is_main  # until the first batch is drawn

    def start(self, step: int, config: str) -> None:
        """Open the logger; figures of a killed run after update ``step`` are taken back.

        Args:
            step: updates done before this start.
            config: text of the configuration.
        """
        if self._kind == "none":
            return
        try:
            with streams_restored():
                self._writer = _open(self._kind, self._folder, step)
        except Exception as error:
            missing = "; install it: pip install -r requirements-extra.txt" if isinstance(error, ImportError) else ""
            logger.warning("LOGGER %s is off: %s%s", self._kind, error, missing)
        self._write(lambda writer: writer.add_text("config", f"```yaml\n{config}\n```", step))

    def figures(self, part: str, row: Mapping[str, Any], step: int) -> None:
        """Write the numbers of ``row`` as curves ``part/NAME`` at update ``step``."""
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        for name, value in numbers.items():
            self._write(lambda writer, name=name, value=value: writer.add_scalar(f"{part}/{name}", value, step))

    def batch(self, images: Tensor, targets: Tensor, classes: Sequence[str], *, step: int, **look: Any) -> None:
        """Draw a batch, ready for the network, into ``batch.png``; see ``draw_batch``."""
        self.picture_due = False
        try:
            sheet = draw_batch(images, targets, classes, **look)
            with atomic_file(self._folder / "batch.png") as temporary:
                sheet.save(temporary, format="PNG", compress_level=1)
        except Exception as error:
            logger.warning("batch.png could not be written: %s; the run goes on without it", error)
            return
        pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
        self._write(lambda writer: writer.add_image("batch", pixels, step, dataformats="HWC"))

    @property
    def observe(self) -> Callable[[Tensor, Tensor, Tensor], None] | None:
        """What ``evaluate`` calls for each batch, None without a logger."""
        return self._collect if self._writer is not None else None

    def _collect(self, scores: Tensor, _targets: Tensor, _indices: Tensor) -> None:
        self._probabilities.append(scores.softmax(dim=1).amax(dim=1))

    def histogram(self, step: int) -> None:
        """Write the histogram of the best class's probability over the images that were observed, and forget them."""
        if self._probabilities:
            values = torch.cat(self._probabilities).float().cpu()
            self._write(lambda writer: writer.add_histogram("validation/probability_of_best_class", values, step))
            self._write(lambda writer: writer.flush())
        self._probabilities.clear()

    def close(self) -> None:
        """Write what is left and close the logger."""
        self._write(lambda writer: writer.close())
        self._writer = None

    def _write(self, action: Callable[["SummaryWriter"], None]) -> None:
        """Let ``action`` write; after an error the logger is off."""
        if self._writer is None:
            return
        try:
            action(self._writer)
        except Exception as error:
            self._writer = None
            logger.warning("LOGGER %s failed and is off from here on: %s", self._kind, error)


def _open(kind: str, folder: Path, step: int) -> "SummaryWriter":
    if kind == "wandb":
        import wandb

        number = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # the same folder is the same run
        name = "/".join(folder.parts[-2:])
        wandb.tensorboard.patch(root_logdir=str(folder))
        wandb.init(dir=str(folder), id=number, name=name, resume="allow")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
