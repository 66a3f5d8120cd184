"""Decode every image of a folder, or of shards, and list those that training could not read.

    python tools/check_data.py /data/imagenet --output bad_images.txt

All image files below the folder are found as training finds them and read in parallel with the decoder that it uses.
What was not taken is counted. Each bad file gets one line in the list, ``path<TAB>reason``; links to nothing, FIFOs and
devices are among them. Files that decode although their JPEG data is damaged count as suspicious: training
uses them, as the published code does, but some of their pixels may be wrong. Of shards (docs/SHARDS.md), in a folder or
at an address, the checksum of each image is compared too.

Exit code: 0 all files are good, 1 there are bad ones, 2 nothing could be checked.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from data import (
    FileSource,
    ShardSource,
    decode_image,
    expanded_path,
    is_address,
    is_shard_set,
    jpeg_complaint,
    list_images,
    part_of,
)
from tools.common import begin_worker, output_path, run_tool, whole_number, write_bytes
from utils.errors import ImageReadError
from utils.runtime import printable, usable_cores

_CHUNK = 64  # files per task
_opened: list[FileSource | ShardSource] = []  # in a process of the pool, the source that it inspects


@dataclass(frozen=True)
class Finding:
    """A file that is ``bad`` (unreadable), or else suspicious."""

    path: str
    reason: str
    bad: bool


def inspect(source: FileSource | ShardSource, index: int) -> Finding | None:
    """Decode one image file; return what is wrong with it, or None."""
    try:
        data = source.read(index)
        decode_image(data, as_array=True, channels=source.channels)
    except ImageReadError as error:
        return Finding(source.name(index), str(error), bad=True)
    complaint = jpeg_complaint(data)
    return Finding(source.name(index), complaint, bad=False) if complaint else None


def scan(source: FileSource | ShardSource, *, workers: int, indices: Sequence[int] | None = None) -> list[Finding]:
    """Inspect images of a source (None: all) in ``workers`` processes; return the findings in their order."""
    indices = range(len(source.targets)) if indices is None else indices
    count = len(indices)
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(source,)) as pool:
        chunk = max(1, min(_CHUNK, count // (4 * workers)))
        results = pool.map(_inspect, indices, chunksize=chunk)
        findings = []
        with tqdm(results, total=count, desc="checking", unit="img", disable=None) as progress:
            for finding in progress:
                if finding is not None:
                    findings.append(finding)
                    progress.set_postfix(bad=sum(f.bad for f in findings))
    return findings


def open_sources(folder: str, channels: int) -> tuple[list[FileSource | ShardSource], list[Finding], list[str]]:
    """Return the images below a folder or an address, what is not a readable file, and remarks.

    Raises:
        ValueError, OSError, RunError: there are no images, or no access to them.
    """
    if not is_address(folder) and not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder; name the one that holds the images or the shards")
    options: dict[str, Any] = {"as_array": True, "channels": channels}
    sets = [where for where in (folder, *(part_of(folder, part) for part in ("train", "val"))) if is_shard_set(where)]
    if sets:
        return [ShardSource(where, **options) for where in sets], [], []
    if is_address(folder):
        raise ValueError(f"{folder} has no set of shards: neither index.json nor train/index.json or val/index.json")
    listing = list_images(folder)
    unusable = [Finding(os.path.join(folder, path), why, bad=True) for path, why in listing.unusable.items()]
    if not listing.images and not unusable:
        raise ValueError(f"no image files below {folder}")
    files = FileSource(folder, listing.images, [0] * len(listing.images), [""], **options)
    return [files], unusable, listing.remarks()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_tool(_command, argv)


def _command(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    sources, findings, remarks = open_sources(args.folder, args.channels)
    count = len(findings) + sum(len(source.targets) for source in sources)
    for source in sources:
        findings += scan(source, workers=args.workers or usable_cores())
    findings.sort(key=lambda finding: finding.path)
    bad = [finding for finding in findings if finding.bad]
    lines = [f"{finding.path}\t{finding.reason}\n" for finding in bad]
    write_bytes(args.output, "".join(lines).encode("utf-8", "surrogateescape"))
    for finding in findings:
        print(printable(f"{'bad' if finding.bad else 'suspicious'}: {finding.path}: {finding.reason}"))
    for remark in remarks:
        print(printable(remark))
    suspicious = len(findings) - len(bad)
    print(f"{count} images: {len(bad)} bad, {suspicious} suspicious; list of bad files: {args.output}")
    return 1 if bad else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "folder", type=_place, help="folder with images, at any depth, or folder or address of shards: DATA.DATA_PATH"
    )
    parser.add_argument(
        "--output", type=output_path, default="bad_images.txt", metavar="FILE", help="list (default: %(default)s)"
    )
    parser.add_argument(
        "--channels", type=whole_number(1, 1024), default=3, metavar="N", help="MODEL.STRIP_MLP.IN_CHANS (default: 3)"
    )
    parser.add_argument(
        "--workers", type=whole_number(0, 1024), default=0, metavar="N", help="processes (default: one per usable core)"
    )
    return parser


def _place(text: str) -> str:
    return text if is_address(text) else str(expanded_path(text))


def _begin(source: FileSource | ShardSource) -> None:
    """Prepare a process of the pool."""
    begin_worker()
    _opened.append(source)


def _inspect(index: int) -> Finding | None:
    return inspect(_opened[-1], index)


if __name__ == "__main__":
    sys.exit(main())
