"""Whether the checkpoints that a run is going to write fit on the disk."""

import os
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from utils.runtime import free_bytes


@dataclass(frozen=True)
class Room:
    """The disk of an output folder against the checkpoints that are planned for it.

    Attributes:
        folder: the output folder, or the innermost folder above it that exists.
        size: bytes of one checkpoint.
        files: checkpoints that are there at the end of the run (``planned_files``).
        present: bytes of those that are there already.
        free: bytes that can still be written; None where the file system does not tell.
        settings: the keys that decide about ``files``, for messages.
    """

    folder: Path
    size: int
    files: int
    present: int
    free: int | None
    settings: str

    @classmethod
    def of(cls, config: CfgNode, folder: Path, size: int, *, epochs: int) -> "Room":
        """Look at the disk of ``folder``, which need not exist.

        Args:
            config: the configuration.
            folder: the output folder.
            size: bytes of one checkpoint.
            epochs: of the whole run, which ``TRAIN.UPDATES`` may have made longer or shorter.
        """
        statuses = [path.stat() for path in folder.glob("c*.pth")]  # names of one file count once
        present = sum({status.st_ino: status.st_size for status in statuses}.values())
        while not folder.exists():
            folder = folder.parent
        settings = f"SAVE_FREQ {config.SAVE_FREQ}, TRAIN.SAVE_KEEP {config.TRAIN.SAVE_KEEP}, and the best"
        return cls(folder, size, planned_files(config, epochs), present, free_bytes(folder), settings)

    @property
    def needed(self) -> int:
        """Bytes that the run is still going to write; at least those of one checkpoint."""
        return max(self.size, self.files * self.size - self.present)

    @property
    def fits_one(self) -> bool:
        """Whether a single checkpoint fits."""
        return self.free is None or self.free >= self.size

    @property
    def problem(self) -> str:
        """What does not fit and what to do about it, or an empty text."""
        if self.free is None or self.free >= self.needed:
            return ""
        free = f"{self.folder} has {self.free / 1e6:,.0f} MB free"
        if not self.fits_one:
            return (
                f"a checkpoint takes about {self.size / 1e6:,.0f} MB, but {free}; make room, or choose another place "
                "with --output"
            )
        return (
            f"the {self.files} checkpoints of the run ({self.settings}) take {self.needed / 1e6:,.0f} MB more, about "
            f"{self.size / 1e6:,.0f} MB each, but {free}, so that the disk would be full before the end; make room, "
            "raise SAVE_FREQ, lower TRAIN.SAVE_KEEP, or choose another place with --output"
        )

    @property
    def problem_of_writing(self) -> str:
        """Why the folder cannot be made or written, and what to do about it, or an empty text."""
        if self.folder.is_dir() and os.access(self.folder, os.W_OK | os.X_OK):
            return ""
        return f"the output folder cannot be written below {self.folder}; choose another place with --output"


def planned_files(config: CfgNode, epochs: int) -> int:
    """Return the largest number of checkpoint files that a run of ``epochs`` epochs has at one time.

    The one being written is included. The number is reached while the last one is written: all milestones, the best,
    and the rolling files, which are deleted after a newer one is durable. Names of the same file count once.
    """
    keep = config.TRAIN.SAVE_KEEP
    milestones = {*range(config.SAVE_FREQ, epochs + 1, config.SAVE_FREQ), epochs}
    if config.TRAIN.SAVE_STEPS or config.TRAIN.SAVE_MINUTES:  # the rolling files are saves within an epoch
        return len(milestones) + keep + 1
    files = len(milestones | set(range(max(1, epochs - keep), epochs)))
    return min(files + 1, epochs)
