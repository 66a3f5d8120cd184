"""Pack the images of folders into indexed shards, which DATA.DATASET shards trains from.

    python tools/pack.py /data/imagenet /data/imagenet-shards

SOURCE holds train/CLASS/IMAGE and val/CLASS/IMAGE; OUT gets train/ and val/ with tar files of WebDataset's layout and
their index (docs/SHARDS.md). Files are packed byte for byte; every image is decoded once, and those that cannot be read
are listed. With ``--resize``, images with a larger shorter side are scaled down and saved as JPEG. The result does not
depend on the number of processes. What is complete stays where the program is stopped: run it again to go on.

Exit status: 0 packed, 1 there are images that cannot be read, 2 another error.
"""

import argparse
import hashlib
import io
import json
import os
import re
import signal
import sys
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from data import (
    INDEX,
    SAMPLES,
    FolderSource,
    Shard,
    class_folders,
    decode_image,
    expanded_path,
    read_image_file,
    write_index,
)
from tools.common import begin_worker, make_folder, printable, progress, run_tool, whole_number
from utils.errors import ImageReadError, RunError
from utils.runtime import atomic_file, usable_cores

_CHUNK = 16  # images per task
_AHEAD = 4  # tasks per process that are under way
_BLOCK = tarfile.BLOCKSIZE
_OURS = re.compile(rf"(\.?shard-\d{{6}}\.(tar|npz))|{re.escape(SAMPLES)}|\..*\.tmp-.*")


@dataclass(frozen=True)
class Options:
    """How images are packed: shorter side (pixels; 0 = as they are), JPEG quality, and channels they are decoded to."""

    resize: int
    quality: int
    channels: int


class Packed(NamedTuple):
    """An image as it is stored: file content and ending; or why it cannot be read."""

    data: bytes
    ending: str
    fault: str = ""


class Plan(NamedTuple):
    """The images ``start`` to ``end`` of a source, which go into one shard."""

    number: int
    start: int
    end: int

    @property
    def name(self) -> str:
        """Name of the tar file."""
        return f"shard-{self.number:06d}.tar"

    @property
    def indices(self) -> range:
        """Numbers of its images."""
        return range(self.start, self.end)


def prepare(path: str, options: Options) -> Packed:
    """Read and decode an image file, and scale it if it is to be scaled."""
    try:
        data = read_image_file(path)
        picture = decode_image(data, as_array=not options.resize, channels=options.channels)
        if options.resize and min(picture.size) > options.resize:
            return Packed(_scaled(picture, options), "jpg")
        return Packed(data, _ending(data))
    except ImageReadError as error:
        return Packed(b"", "", str(error))


def _scaled(picture: Image.Image, options: Options) -> bytes:
    ratio = options.resize / min(picture.size)
    size = [max(options.resize, round(side * ratio)) for side in picture.size]
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=options.quality)
    return buffer.getvalue()


def _ending(data: bytes) -> str:
    """Return the ending that WebDataset knows the format by, whatever the file was called."""
    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(image.format, str(image.format).lower())


def plan_shards(sizes: Sequence[int], limit: int) -> list[Plan]:
    """Divide images of these file sizes (bytes) into shards of about ``limit`` bytes, at least one image each."""
    plans, start, filled = [], 0, 0
    for index, size in enumerate(sizes):
        size = 3 * _BLOCK + -(-size // _BLOCK) * _BLOCK  # label and two headers
        if index > start and filled + size > limit:
            plans.append(Plan(len(plans), start, index))
            start, filled = index, 0
        filled += size
    return [*plans, Plan(len(plans), start, len(sizes))]


def pack(source: FolderSource, folder: Path, *, options: Options, limit: int, workers: int) -> list[str]:
    """Pack a source into ``folder``; return a line for each image that cannot be read.

    If there is any, the set stays incomplete.

    Args:
        source: the images.
        folder: of the set; made if need be.
        options: how images are stored.
        limit: size of a shard, bytes of the files that go into it.
        workers: processes.

    Raises:
        ValueError: the folder holds something else, or another complete set.
        OSError: something could not be written.
    """
    paths = [source.name(index) for index in range(len(source.targets))]
    names = [path.removeprefix(f"{source.root}/") for path in paths]
    status = [os.stat(path) for path in paths]
    facts = [(n, s.st_size, label) for n, s, label in zip(names, status, source.targets.tolist(), strict=True)]
    packed = asdict(options) | {"source": _digest(facts, source.classes, limit)}
    if options.resize:
        packed["pillow"] = PIL.__version__
    if _is_complete(folder, packed):
        print(f"{folder}: packed already from files of these names and sizes; delete it to pack them anew")
        return []
    plans = plan_shards([entry.st_size for entry in status], limit)
    _prepare_folder(folder, plans)
    times = [entry.st_mtime_ns for entry in status]
    keys = [_digest(plan, facts[plan.start : plan.end], times[plan.start : plan.end], packed) for plan in plans]
    parts = [_read_part(folder, plan, key) for plan, key in zip(plans, keys, strict=True)]
    wanted = [index for plan, part in zip(plans, parts, strict=True) if part is None for index in plan.indices]
    faults: list[str] = []
    with ProcessPoolExecutor(workers, initializer=begin_worker) as pool:
        prepared = _in_order(pool, partial(prepare, options=options), [paths[index] for index in wanted], workers)
        images = iter(progress(prepared, total=len(wanted), desc=f"packing {folder.name}"))
        for plan, key in zip(plans, keys, strict=True):
            if parts[plan.number] is None:
                try:
                    parts[plan.number] = _write_shard(folder, plan, key, images, source)
                except _UnreadableError as error:
                    faults += error.args[0]
        next(images, None)  # completes the progress bar
    if not faults:
        _finish(folder, plans, parts, source, names, packed)
    return faults


class _UnreadableError(Exception):
    """Images of a shard cannot be read; the argument lists them."""


def _write_shard(
    folder: Path, plan: Plan, key: str, images: Iterator[Packed], source: FolderSource
) -> dict[str, np.ndarray]:
    """Write a shard; return offset, size and CRC-32 of each image, which ``_read_part`` finds again."""
    rows, faults, path = [], [], folder / plan.name
    try:
        with atomic_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in plan.indices:
                image = next(images)
                if image.fault:
                    faults.append(f"{source.name(index)}: {image.fault}")
                    continue
                _add(tar, f"{index:09d}.cls", b"%d" % source.targets[index])
                start = _add(tar, f"{index:09d}.{image.ending}", image.data)
                rows.append((start, len(image.data), zlib.crc32(image.data)))
            if faults:
                raise _UnreadableError(faults)
        part = dict(zip(("offset", "size", "crc32"), np.array(rows, dtype=np.int64).T, strict=True))
        with atomic_file(_part_file(folder, plan)) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, key=key, bytes=path.stat().st_size, **part)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; mend that and run the same command again: complete "
            "shards are kept"
        ) from error
    return part


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member and return where its data begin; nothing but the arguments goes into it, no time and no user."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    start = tar.offset + _BLOCK  # a short name takes one header
    tar.addfile(member, io.BytesIO(data))
    return start


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[str], Packed], paths: Sequence[str], workers: int
) -> Iterator[Packed]:
    """Yield the results in the order of the paths; a few tasks are under way, so that memory is bounded."""
    pending: deque[Future[list[Packed]]] = deque()
    try:
        for start in range(0, len(paths), _CHUNK):
            pending.append(pool.submit(_apply, function, paths[start : start + _CHUNK]))
            if len(pending) > _AHEAD * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process was killed, perhaps for want of memory; take fewer with --workers and run the command again: "
            "complete shards are kept"
        ) from error


def _apply(function: Callable[[str], Packed], paths: Sequence[str]) -> list[Packed]:
    return [function(path) for path in paths]


def _is_complete(folder: Path, packed: dict) -> bool:
    """Return whether the folder holds the complete set; another complete set is an error."""
    if not (folder / INDEX).exists():
        return False
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))["packed"]
    except (ValueError, KeyError, TypeError):
        found = None
    if found != packed:
        raise ValueError(f"{folder} holds a set of other images, or one packed with other options; name another OUT")
    return True


def _prepare_folder(folder: Path, plans: Sequence[Plan]) -> None:
    """Make the folder, and remove what an earlier, unfinished packing left that is not part of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(os.listdir(folder))
    strangers = [name for name in names if not _OURS.fullmatch(name)]
    if strangers:
        raise ValueError(f"{folder} holds other files such as {strangers[0]!r}; name an empty or a new folder as OUT")
    kept = {plan.name for plan in plans} | {_part_file(folder, plan).name for plan in plans}
    for name in names:
        if name not in kept:
            (folder / name).unlink()


def _part_file(folder: Path, plan: Plan) -> Path:
    return folder / f".{Path(plan.name).stem}.npz"


def _read_part(folder: Path, plan: Plan, key: str) -> dict[str, np.ndarray] | None:
    """Return what ``_write_shard`` returned, if the shard is complete and of the same images and options."""
    try:
        with np.load(_part_file(folder, plan), allow_pickle=False) as stored:
            if stored["key"] == key and stored["bytes"] == (folder / plan.name).stat().st_size:
                return {name: stored[name] for name in ("offset", "size", "crc32")}
    except FileNotFoundError:
        pass  # it is packed now
    return None


def _finish(
    folder: Path, plans: Sequence[Plan], parts: Sequence[dict], source: FolderSource, names: Sequence[str], packed: dict
) -> None:
    """Write the index, and remove what was needed for going on."""
    columns = {name: np.concatenate([part[name] for part in parts]) for name in ("offset", "size", "crc32")}
    columns["shard"] = np.repeat(np.arange(len(plans)), [len(plan.indices) for plan in plans])
    columns["label"] = source.targets
    shards = [Shard(plan.name, (folder / plan.name).stat().st_size, len(plan.indices)) for plan in plans]
    write_index(folder, classes=source.classes, shards=shards, columns=columns, names=names, packed=packed)
    for plan in plans:
        _part_file(folder, plan).unlink()
    count, total = len(shards), sum(shard.size for shard in shards)
    print(
        f"{folder}: {len(names)} images of {len(source.classes)} classes in {count} shard{'s' * (count > 1)}, "
        f"{total / 1e6:.1f} MB"
    )


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _terminated(*_: Any) -> None:
    raise KeyboardInterrupt


def command(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.quality is not None and not args.resize:
        parser.error("--quality is that of resized images; it needs --resize")
    if args.resize and args.channels not in (1, 3):
        parser.error("--resize saves RGB or grey JPEG files; it needs --channels 3 or 1")
    if not args.source.is_dir():
        raise ValueError(f"{args.source} is not a folder; name one with train/ and val/ as SOURCE")
    options = Options(args.resize, 95 if args.quality is None else args.quality, args.channels)
    parts = args.parts or [part for part in ("train", "val") if (args.source / part).is_dir()]
    if not parts:
        raise ValueError(
            f"{args.source} has neither train/ nor val/, with a folder for each class; --parts names others"
        )
    for part in parts:
        if args.out.resolve().is_relative_to((args.source / part).resolve()):
            raise ValueError(f"{args.out} lies among the images, of {args.source / part}; name another folder as OUT")
        make_folder(args.out / part, "OUT")
    signal.signal(signal.SIGTERM, _terminated)
    faults = []
    try:
        for part in parts:
            classes = [] if part == "train" else class_folders(args.source / "train")
            source = FolderSource(args.source / part, classes=classes, as_array=False, channels=args.channels)
            limit, workers = args.shard_size * 10**6, args.workers or usable_cores()
            faults += pack(source, args.out / part, options=options, limit=limit, workers=workers)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last complete shard", file=sys.stderr)
        return 130
    for fault in faults:
        print(f"bad: {printable(fault)}")
    if faults:
        print(
            f"{len(faults)} images cannot be read: repair or remove them and run the same command again",
            file=sys.stderr,
        )
    return 1 if faults else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SOURCE", type=expanded_path, help="folder with train/ and val/")
    parser.add_argument("out", metavar="OUT", type=expanded_path, help="folder for the shards")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="folders of SOURCE to pack (default: train val)")
    parser.add_argument(
        "--resize", type=whole_number(1, 65535), default=0, metavar="N", help="shorter side of larger images, pixels"
    )
    parser.add_argument(
        "--quality", type=whole_number(1, 100), metavar="Q", help="JPEG quality of resized images (default: 95)"
    )
    parser.add_argument(
        "--shard-size",
        type=whole_number(1, 10**6),
        default=256,
        metavar="MB",
        help="size of a shard (default: 256)",
    )
    parser.add_argument(
        "--channels", type=whole_number(1, 1024), default=3, help="MODEL.STRIP_MLP.IN_CHANS (default: 3)"
    )
    parser.add_argument(
        "--workers", type=whole_number(0, 1024), default=0, metavar="N", help="processes (default: one per usable core)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(command))
