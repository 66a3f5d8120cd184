"""Split Caltech-101, or any folder of class folders, into ``train/CLASS`` and ``val/CLASS``.

    python categories101_train_val_split.py --source 101_ObjectCategories --target caltech101

As in the published split, each class is shuffled under seed 1024 and its first ``int(0.8 * n)`` images go to train/.
Unlike there, names are sorted before the shuffle, so the split does not depend on the file system; BACKGROUND_Google,
which is not a category, is left out; and an existing split is replaced only on request.
"""

import argparse
import os
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from data import expanded_path, list_images

BACKGROUND = "BACKGROUND_Google"
PARTS = ("train", "val")

Split = dict[str, dict[str, list[str]]]  # part -> class -> file names


def split_classes(files: Mapping[str, Sequence[str]], *, seed: int = 1024, ratio: float = 0.8) -> Split:
    """Divide the files of each class into train and val.

    The result depends on the names, the seed and the ratio only: files are taken in sorted order, and each class is
    shuffled on its own, so that adding or removing a class does not change the others.

    Args:
        files: class name -> file names.
        seed: seed of the shuffle.
        ratio: share of each class that goes to train; ``int(ratio * n)`` files.

    Raises:
        ValueError: a ratio outside (0, 1), or a class too small to be in both parts.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"the ratio is {ratio}; it must lie between 0 and 1")
    split: Split = {part: {} for part in PARTS}
    for name in sorted(files):
        shuffled = sorted(files[name])
        random.Random(seed).shuffle(shuffled)
        count = int(ratio * len(shuffled))
        if count in (0, len(shuffled)):
            raise ValueError(
                f"class {name!r} has {len(shuffled)} images: too few to split them {ratio:g} : {1 - ratio:g}"
            )
        split["train"][name] = sorted(shuffled[:count])
        split["val"][name] = sorted(shuffled[count:])
    return split


def list_classes(source: Path, *, keep_background: bool = False) -> dict[str, list[str]]:
    """Return the images of each class folder in ``source``, as paths below it, found as training finds them.

    What was not taken is reported on stderr.

    Raises:
        FileNotFoundError: no such folder, or no class folders in it.
        ValueError: links in a circle, or files that cannot be read.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"--source {source} is not a folder; unpack 101_ObjectCategories.tar.gz and name it")
    listing = list_images(source)
    names = [name for name in listing.folders if keep_background or name != BACKGROUND]
    if not names:
        raise FileNotFoundError(f"--source {source} has no class folders")
    unusable = [f"{path} ({why})" for path, why in sorted(listing.unusable.items()) if path.split(os.sep)[0] in names]
    if unusable:
        raise ValueError(f"--source {source} holds {len(unusable)} files that cannot be read, first {unusable[0]}")
    for remark in listing.remarks():
        print(remark, file=sys.stderr)
    classes: dict[str, list[str]] = {name: [] for name in names}
    for path in listing.images:
        name, _, rest = path.partition(os.sep)
        if name in classes:
            classes[name].append(rest)
    return classes


def write_split(split: Split, source: Path, target: Path, *, symlink: bool = False) -> None:
    """Copy or link the files of a split from ``source/CLASS`` to ``target/PART/CLASS``.

    The parts are built under other names and replace an earlier split only when they are complete, so an interrupted
    run neither loses the old split nor leaves half of a new one.

    Raises:
        OSError: a file cannot be read or written.
    """
    jobs = [(part, name, file) for part in split for name in split[part] for file in split[part][name]]
    unfinished = {part: target / f".{part}.unfinished" for part in split}
    for folder in unfinished.values():
        shutil.rmtree(folder, ignore_errors=True)
    for part, name, file in tqdm(jobs, desc="linking" if symlink else "copying", unit="img", disable=None):
        original, copy = source / name / file, unfinished[part] / name / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        if symlink:
            copy.symlink_to(original.resolve())
        else:
            shutil.copy2(original, copy)
    for part, folder in unfinished.items():
        _remove(target / part)
        folder.rename(target / part)


def check_target(source: Path, target: Path, *, force: bool = False) -> None:
    """Refuse a target where writing would damage something.

    Raises:
        ValueError: the target lies inside the source.
        FileExistsError: it already holds a split, and ``force`` is not set.
    """
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--target {target} lies in --source, where train/ and val/ would look like classes")
    existing = [str(target / part) for part in PARTS if os.path.lexists(target / part)]
    if existing and not force:
        raise FileExistsError(f"{' and '.join(existing)} already exist; --force replaces them, or use another --target")


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = build_parser().parse_args(argv)
    try:
        check_target(args.source, args.target, force=args.force)
        files = list_classes(args.source, keep_background=args.keep_background)
        split = split_classes(files, seed=args.seed, ratio=args.ratio)
        write_split(split, args.source, args.target, symlink=args.symlink)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = {part: sum(map(len, split[part].values())) for part in PARTS}
    print(f"{len(files)} classes, {sum(counts.values())} images (seed {args.seed}, ratio {args.ratio:g})")
    for part in PARTS:
        print(f"  {part:<5} {counts[part]:>6} images in {args.target / part}")
    if not args.keep_background and (args.source / BACKGROUND).is_dir():
        print(f"  {BACKGROUND} is not a category and was left out (--keep-background keeps it)")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Split a folder of class folders into train/ and val/.")
    parser.add_argument(
        "--source", type=expanded_path, required=True, help="folder with one folder of images per class"
    )
    parser.add_argument(
        "--target", type=expanded_path, required=True, help="folder that gets train/CLASS and val/CLASS"
    )
    parser.add_argument(
        "--seed", type=int, default=1024, help="seed of the shuffle (default: %(default)s, as published)"
    )
    parser.add_argument("--ratio", type=float, default=0.8, help="share that goes to train/ (default: %(default)s)")
    parser.add_argument("--symlink", action="store_true", help="link to the originals instead of copying them")
    parser.add_argument("--keep-background", action="store_true", help=f"keep {BACKGROUND} as a class")
    parser.add_argument("--force", action="store_true", help="replace an existing split in --target")
    return parser


if __name__ == "__main__":
    sys.exit(main())
