"""Decode every image of a folder and list those that training could not read.

    python tools/check_data.py /data/imagenet --output bad_images.txt

All image files below the folder are found as training finds them and read in parallel with the decoder that it uses.
What was not taken is counted. Each bad file gets one line in the list, ``path<TAB>reason``; links to nothing, FIFOs and
devices are among them. Files that decode although their JPEG data is damaged count as suspicious: training
uses them, as the published code does, but some of their pixels may be wrong.

Exit code: 0 all files are good, 1 there are bad ones, 2 nothing could be checked.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from data import decode_image, expanded_path, jpeg_complaint, list_images, read_image_file
from utils.errors import ImageReadError
from utils.runtime import usable_cores

_CHUNK = 64  # files per task


@dataclass(frozen=True)
class Finding:
    """A file that is ``bad`` (unreadable), or else suspicious."""

    path: str
    reason: str
    bad: bool


def inspect(path: str, channels: int = 3) -> Finding | None:
    """Decode one file to so many channels; return what is wrong with it, or None."""
    try:
        data = read_image_file(path)
        decode_image(data, as_array=True, channels=channels)
    except ImageReadError as error:
        return Finding(path, str(error), bad=True)
    complaint = jpeg_complaint(data)
    return Finding(path, complaint, bad=False) if complaint else None


def scan(paths: Sequence[str], *, workers: int, channels: int = 3) -> list[Finding]:
    """Inspect files in ``workers`` processes; return the findings in the order of the paths."""
    with ProcessPoolExecutor(workers, initializer=_ignore_interrupt) as pool:
        chunk = max(1, min(_CHUNK, len(paths) // (4 * workers)))
        results = pool.map(partial(inspect, channels=channels), paths, chunksize=chunk)
        findings = []
        with tqdm(results, total=len(paths), desc="checking", unit="img", disable=None) as progress:
            for finding in progress:
                if finding is not None:
                    findings.append(finding)
                    progress.set_postfix(bad=sum(f.bad for f in findings))
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = build_parser().parse_args(argv)
    try:
        listing = list_images(args.folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    unusable = [Finding(os.path.join(args.folder, path), why, bad=True) for path, why in listing.unusable.items()]
    paths = [os.path.join(args.folder, path) for path in listing.images]
    if not paths and not unusable:
        print(f"error: no image files below {args.folder}", file=sys.stderr)
        return 2
    findings = sorted(
        unusable + scan(paths, workers=args.workers or usable_cores(), channels=args.channels), key=lambda f: f.path
    )
    bad = [finding for finding in findings if finding.bad]
    suspicious = [finding for finding in findings if not finding.bad]
    lines = [f"{finding.path}\t{finding.reason}\n" for finding in bad]
    try:
        args.output.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        print(f"error: cannot write --output {args.output}: {error.strerror}", file=sys.stderr)
        return 2
    for finding in findings:
        print(f"{'bad' if finding.bad else 'suspicious'}: {finding.path}: {finding.reason}")
    for remark in listing.remarks():
        print(remark)
    print(
        f"{len(paths) + len(unusable)} images: {len(bad)} bad, {len(suspicious)} suspicious; "
        f"list of bad files: {args.output}"
    )
    return 1 if bad else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Decode every image of a folder and list the unreadable ones.")
    parser.add_argument("folder", type=expanded_path, help="folder with images, at any depth, such as DATA.DATA_PATH")
    parser.add_argument(
        "--output", type=expanded_path, default=Path("bad_images.txt"), help="list (default: %(default)s)"
    )
    parser.add_argument("--channels", type=int, default=3, help="MODEL.STRIP_MLP.IN_CHANS (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one for each usable core)")
    return parser


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the pool


if __name__ == "__main__":
    sys.exit(main())
