"""The whole loop against its parts, and the time from the command to the first update."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import main
from models import accelerate, build_model
from tools.bench.report import ROOT, Table
from tools.bench.timing import Spread, paired_ratio
from utils.config import load_config
from utils.runtime import StopRequest, start_run
from utils.session import Session
from utils.training import build_optimizer

QUICKSTART = ROOT / "configs/quickstart_digits.yaml"
_FIRST_UPDATE_SECONDS = 120


class _AfterUpdates(StopRequest):
    """Ends the epoch after a number of updates."""

    def __init__(self, updates: int) -> None:
        super().__init__()
        self._updates = self._left = updates

    def poll(self) -> str:
        self._left -= 1
        self.agreed = "" if self._left else "measured"
        if not self._left:
            self._left = self._updates
        return self.agreed


def end_to_end_table(cfg: Path, overrides: dict, opts: Sequence[str], *, updates: int, rounds: int) -> Table:
    """Images per second of the training loop, of the bare step on random images, and of the loader alone.

    Args:
        cfg, overrides, opts: of the config.
        updates: in each measurement; an epoch must have as many.
        rounds: measurements of each, interleaved, after one for warm-up.

    Raises:
        SystemExit: what the run's log says, such as a data set that is too small.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(cfg, opts, {**overrides, "OUTPUT": folder, "PRINT_FREQ": updates})
        with start_run(config) as run:
            session = main.build_session(config, run, _AfterUpdates(updates))
            if session.updates_per_epoch < updates:
                raise ValueError(
                    f"an epoch has {session.updates_per_epoch} updates, fewer than the {updates} asked "
                    "for; give fewer --updates, a smaller --batch, or more images"
                )
            model, state = main.build_training(session)
            waits: list[float] = []

            def loop() -> None:
                waits.append(main.train_one_epoch(model, state, session)["data_wait"])
                state.progress.epoch, state.progress.samples_seen = state.progress.epoch + 1, 0

            bare = _bare_step(session)
            parts = {
                "bare step, random images": lambda: [bare() for _ in range(updates)],
                "training loop": loop,
                "loader alone": lambda: _drain(session.loader, updates * session.accumulation),
            }
            times = _interleaved(parts, rounds)
            images = updates * session.accumulation * config.DATA.BATCH_SIZE
            return _table(times, images, waits[1:], session, updates)


def _interleaved(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name in parts if number % 2 else reversed(parts):
            start = time.perf_counter()
            parts[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def _bare_step(session: Session) -> Callable[[], None]:
    """An update with nothing around it: no wrapper, no guard, no clipping, no metrics, random images."""
    config, device = session.config, session.run.device
    model = accelerate(build_model(config).to(device), device)
    optimizer = build_optimizer(config, model, lr=1e-4)
    size, classes = config.DATA.IMG_SIZE, config.MODEL.NUM_CLASSES
    images = torch.randn(config.DATA.BATCH_SIZE, config.MODEL.STRIP_MLP.IN_CHANS, size, size, device=device)
    images = images.to(memory_format=torch.channels_last)
    targets = torch.arange(len(images), device=device) % classes
    if session.transform.mixes:
        targets = torch.nn.functional.one_hot(targets, classes).float()

    def step() -> None:
        for _ in range(session.accumulation):
            with session.precision.autocast():
                loss = session.criterion(model(images), targets)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _drain(loader: DataLoader, batches: int) -> None:
    for number, _ in enumerate(loader, start=1):
        if number == batches:
            return


def _table(times: dict[str, list[float]], images: int, waits: Sequence[float], session: Session, updates: int) -> Table:
    bare = times["bare step, random images"]
    rows = []
    for name, seconds in times.items():
        spread, ratio = Spread.of([images / t for t in seconds]), paired_ratio(seconds, bare)
        wait = f"{100 * statistics.median(waits):.0f} %" if name == "training loop" else None
        rows.append(
            {
                "label": name,
                "images_per_second": spread.median,
                "data_wait": wait,
                "seconds": seconds,
                "spread": f"{spread.low:.3g} - {spread.high:.3g}",
                "ratio": f"{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})",
            }
        )
    config = session.config
    title = (
        f"end to end: {config.MODEL.NAME}, batch {config.DATA.BATCH_SIZE} x {session.accumulation}, "
        f"{config.DATA.IMG_SIZE} pixels, {session.precision.description}, {session.loader.num_workers} worker(s), "
        f"{torch.get_num_threads()} thread(s), {len(bare)} interleaved rounds of {updates} updates, wall time"
    )
    columns = [
        ("", "label"),
        ("images/s", "images_per_second"),
        ("min - max", "spread"),
        ("x bare step", "ratio"),
        ("data wait", "data_wait"),
    ]
    return Table(title, columns, rows)


def startup_table(rounds: int) -> Table:
    """Seconds from the command to the first update of the quickstart, with its milestones."""
    milestones = {
        "imports, process group, log": " command: ",
        "data": " data: ",
        "model": " update: ",
        "first update": " update 1/",
    }
    seen: dict[str, list[float]] = {name: [] for name in milestones}
    libraries = []
    _first_update(milestones)  # from now on the files are in memory
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, timm"], check=True)
        libraries.append(time.perf_counter() - start)
        for name, seconds in _first_update(milestones).items():
            seen[name].append(seconds)
    rows = [{"label": "(import torch, timm alone)", **_seconds(libraries)}]
    rows += [{"label": name, **_seconds(times)} for name, times in seen.items()]
    title = f"start-up of {QUICKSTART.relative_to(ROOT)}: seconds since the command, {rounds} rounds"
    return Table(title, [("", "label"), ("s", "median"), ("min - max", "spread")], rows)


def _seconds(times: Sequence[float]) -> dict[str, object]:
    spread = Spread.of(times)
    return {"median": spread.median, "spread": f"{spread.low:.1f} - {spread.high:.1f}", "seconds": list(times)}


def _first_update(milestones: dict[str, str]) -> dict[str, float]:
    """Start the quickstart, note when each milestone's text appears in its log, and end it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-u",
            "main.py",
            "--cfg",
            str(QUICKSTART),
            "--output",
            folder,
            "--opts",
            "PRINT_FREQ",
            "1",
        ]
        start, found = time.perf_counter(), {}
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            for line in process.stdout:
                now = time.perf_counter() - start
                found.update({name: now for name, text in milestones.items() if text in line and name not in found})
                if len(found) == len(milestones) or now > _FIRST_UPDATE_SECONDS:
                    break
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    if len(found) < len(milestones):
        raise RuntimeError(f"the quickstart ended before its first update; run {' '.join(command)} to see why")
    return found
