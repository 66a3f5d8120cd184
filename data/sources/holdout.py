"""Parts of the training images: those held out for validation (DATA.HOLDOUT), and the share trained on.

Of each class, the images that come first in the order of a hash of seed and path are held out: the same everywhere,
whatever the order of the files, and hardly different where images are added. The list is stored in the run's folder,
and decides from then on: images that are added later are trained on, and nothing moves from one part to the other.
DATA.TRAIN_SHARE takes a part of the training images in the order of another hash.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from data.dataset import ImageDataset
from data.sources.base import ArraySource, FileSource
from data.sources.listing import some
from utils.config import run_folder
from utils.runtime import write_text_atomic

FILE = "holdout.json"


@dataclass(frozen=True)
class HeldOut:
    """The images that are held out, by their paths below DATA.DATA_PATH, sorted, and where they come from."""

    share: float
    seed: int
    images: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A hash of the list, which checkpoints hold."""
        return hashlib.sha256("\0".join(self.images).encode(errors="surrogateescape")).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the list to ``folder/holdout.json``."""
        text = {"share": self.share, "seed": self.seed, "images": list(self.images)}
        write_text_atomic(folder / FILE, json.dumps(text, indent=0) + "\n")


def read_held_out(file: Path) -> HeldOut:
    """Return the list that ``HeldOut.write`` wrote.

    Raises:
        ValueError: the file is not such a list.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return HeldOut(float(content["share"]), int(content["seed"]), tuple(map(str, content["images"])))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not the list of the held-out images that a run has written ({error!r}); put it back, or delete "
            "it, to divide the images anew"
        ) from error


def hold_out(source: FileSource, config: CfgNode, *, is_train: bool) -> None:
    """Leave the training part, or the held-out part, in a source of all images.

    The list beside the checkpoint of MODEL.RESUME, or in the run's folder, decides which are held out; where there is
    none, or it is for other data, or a new run of that folder has another share or seed, the images are divided anew.

    Raises:
        ValueError: a class has one image, or images of the list are not there.
    """
    names = [_relative(source.name(index), config) for index in range(len(source.targets))]
    held_out = _stored_list(config, names)
    if held_out is None:
        held_out = set(choose(names, source.targets, source.classes, config.DATA.HOLDOUT, config.SEED))
    source.keep(np.flatnonzero([(name in held_out) != is_train for name in names]))


def keep_share(source: FileSource | ArraySource, config: CfgNode) -> None:
    """Leave DATA.TRAIN_SHARE of each class in a source of training images, rounded, at least one image."""
    names = [_relative(source.name(index), config) for index in range(len(source.targets))]
    kept = set()
    for members in _by_class(names, source.targets, f"share\0{config.SEED}"):
        kept.update(members[: max(1, round(config.DATA.TRAIN_SHARE * len(members)))])
    source.keep(np.flatnonzero([name in kept for name in names]))


def choose(names: Sequence[str], targets: np.ndarray, classes: Sequence[str], share: float, seed: int) -> list[str]:
    """Return the names that are held out: of each class ``share``, rounded, at least one image and never all.

    Args:
        names: of all images.
        targets: int64 (N,), their labels.
        classes: names of the classes.
        share: between 0 and 1.
        seed: of the run.

    Raises:
        ValueError: classes with a single image; names them.
    """
    counts = np.bincount(targets, minlength=len(classes))
    single = [name for name, count in zip(classes, counts, strict=True) if count == 1]
    if single:
        raise ValueError(
            f"DATA.HOLDOUT is {share:g}, but some classes have a single image, which cannot be in both parts: "
            f"{some(single)}; add images, or remove these classes"
        )
    held_out = []
    for members in _by_class(names, targets, str(seed)):
        held_out += members[: min(max(1, round(share * len(members))), len(members) - 1)]
    return held_out


def _by_class(names: Sequence[str], targets: np.ndarray, salt: str) -> Iterator[list[str]]:
    """Yield the names of each class that has images, in the order of a hash of salt and name."""
    for label in np.unique(targets):
        yield sorted(
            (names[index] for index in np.flatnonzero(targets == label)),
            key=lambda name: hashlib.sha256(f"{salt}\0{name}".encode(errors="surrogateescape")).digest(),
        )


def held_out_images(config: CfgNode, val_dataset: ImageDataset) -> HeldOut | None:
    """Return what the validation set holds under DATA.HOLDOUT, None where nothing is held out."""
    if not config.DATA.HOLDOUT:
        return None
    names = sorted(_relative(val_dataset.sample_name(index), config) for index in range(len(val_dataset)))
    return HeldOut(config.DATA.HOLDOUT, config.SEED, tuple(names))


def _relative(name: str, config: CfgNode) -> str:
    root = Path(config.DATA.DATA_PATH)
    return name.removeprefix(f"{root.parent if root.is_file() else root}/")


def _stored_list(config: CfgNode, names: Sequence[str]) -> set[str] | None:
    """Return what the run, or the checkpoint that it starts from, holds out; None if no list for these data decides."""
    source = config.MODEL.RESUME or (config.MODEL.PRETRAINED if config.EVAL_MODE else "")
    folders = ([Path(source).parent] if source else []) + ([] if config.EVAL_MODE else [run_folder(config)])
    file = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if file is None:
        return None
    listed = read_held_out(file)
    is_new_run = not source and (listed.share, listed.seed) != (config.DATA.HOLDOUT, config.SEED)
    held_out = set(listed.images)
    missing = sorted(held_out - set(names))
    if is_new_run or len(missing) == len(held_out):
        return None
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(held_out)} images that {file} holds out are not in DATA.DATA_PATH "
            f"{config.DATA.DATA_PATH} ({some(missing)}); put them back, or start another run with --tag NEW"
        )
    return held_out
