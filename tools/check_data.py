"""Decode every image of a folder and list those that training could not read.

    python tools/check_data.py /data/imagenet --output bad_images.txt

All image files below the folder are read in parallel with the decoder that training uses. Each bad file gets one line
in the list, ``path<TAB>reason``. Files that decode although their JPEG data is damaged count as suspicious: training
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
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from data import decode_image, jpeg_complaint
from utils.errors import ImageReadError
from utils.runtime import usable_cores

_CHUNK = 64  # files per task


@dataclass(frozen=True)
class Finding:
    """A file that is ``bad`` (unreadable), or else suspicious."""

    path: str
    reason: str
    bad: bool


def inspect(path: str) -> Finding | None:
    """Decode one file; return what is wrong with it, or None."""
    try:
        data = Path(path).read_bytes()
        decode_image(data, as_array=True)
    except OSError as error:
        return Finding(path, f"{error.strerror} [{type(error).__name__}]", bad=True)
    except ImageReadError as error:
        return Finding(path, str(error), bad=True)
    complaint = jpeg_complaint(data)
    return Finding(path, complaint, bad=False) if complaint else None


def list_images(folder: str | Path) -> list[str]:
    """Return the paths of all image files below ``folder``, sorted; links to folders are followed."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        found += [os.path.join(parent, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    return sorted(found)


def scan(paths: Sequence[str], *, workers: int) -> list[Finding]:
    """Inspect files in ``workers`` processes; return the findings in the order of the paths."""
    with ProcessPoolExecutor(workers, initializer=_ignore_interrupt) as pool:
        chunk = max(1, min(_CHUNK, len(paths) // (4 * workers)))
        results = pool.map(inspect, paths, chunksize=chunk)
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
    paths = list_images(args.folder)
    if not paths:
        print(f"error: no image files below {args.folder}", file=sys.stderr)
        return 2
    findings = scan(paths, workers=args.workers or usable_cores())
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
    print(f"{len(paths)} images: {len(bad)} bad, {len(suspicious)} suspicious; list of bad files: {args.output}")
    return 1 if bad else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description="Decode every image of a folder and list the unreadable ones.")
    parser.add_argument("folder", type=Path, help="folder with images, at any depth, such as DATA.DATA_PATH")
    parser.add_argument("--output", type=Path, default=Path("bad_images.txt"), help="list (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one for each usable core)")
    return parser


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the pool


if __name__ == "__main__":
    sys.exit(main())
