"""Start runs with faults, wait for them, and compare what they leave behind."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.builders import TINY_MODEL
from utils.checkpoint.files import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("driver.py")
LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"
TRAIN_IMAGES, VAL_IMAGES = 48, 21  # 48 is a multiple of every global batch below
PATIENCE = 240.0  # seconds a run may take on a busy machine
STATE = ("model", "ema", "optimizer", "lr", "scaler", "guard", "progress", "rank_state", "world_size")

Fault = tuple[str, dict[str, Any]]

CONFIG = """
DATA: {{DATASET: folder, DATA_PATH: {data}, IMG_SIZE: 32, BATCH_SIZE: 4, NUM_WORKERS: 0}}
MODEL: {model}
TRAIN: {{EPOCHS: 2, WARMUP_EPOCHS: 1, BASE_LR: 2e-3, AMP: bf16, EMA_DECAY: 0.9, DIST_TIMEOUT: 120}}
PRINT_FREQ: 4
"""


def write_data(folder: Path) -> Path:
    """Write a small image folder (three classes, PNG) and return it."""
    random = np.random.default_rng(0)
    for part, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for number in range(count):
            path = folder / part / "abc"[number % 3] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (40, 36, 3)) // 2 + 60 * (number % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def write_config(folder: Path) -> Path:
    """Write the data and the config of the runs; return the config's path."""
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(data=write_data(folder / "images"), model=TINY_MODEL))
    return path


@dataclass
class Job:
    """A run in progress or ended: one process per rank, or one launcher.

    Attributes:
        pids: process ids, by rank.
        folder: output folder of the run (``OUTPUT/tiny/TAG``).
        logs: what each process wrote to stdout and stderr.
        marker: text in the environment of a launcher's processes.
    """

    starter: "Starter"
    pids: list[int]
    folder: Path
    logs: list[Path]
    marker: str = ""
    codes: list[int | None] = field(default_factory=list)
    seconds: float = 0.0

    def poll(self) -> list[int | None]:
        """Return codes so far, None for a process that runs."""
        self.codes = self.codes or [None] * len(self.pids)
        self.codes = [
            self.starter.poll(pid) if code is None else code for pid, code in zip(self.pids, self.codes, strict=True)
        ]
        return self.codes

    def wait(self, seconds: float = PATIENCE) -> "Job":
        """Wait for all processes; a run that takes longer is killed and fails the test."""
        started = time.monotonic()
        while None in self.poll():
            if time.monotonic() - started > seconds:
                self.kill()
                raise AssertionError(f"the run did not end within {seconds:.0f} s:\n{self.text()}")
            time.sleep(0.05)
        self.seconds = time.monotonic() - started
        return self

    def wait_for(self, condition, what: str, seconds: float = PATIENCE) -> None:
        """Wait until ``condition()`` holds while the run goes on."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or None not in self.poll():
                self.kill()
                raise AssertionError(f"the run did not reach: {what}\n{self.text()}")
            time.sleep(0.02)

    def signal(self, number: int, rank: int = 0, *, group: bool = False) -> None:
        """Send a signal to a process, or to its group: the process and its data workers."""
        (os.killpg if group else os.kill)(self.pids[rank], number)

    def kill(self) -> None:
        """Kill everything that is left of the run."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Process ids of everything that the run has started and that is still alive."""
        return [
            pid
            for pid, session, environment in _all_processes()
            if session in self.pids or (self.marker and self.marker in environment)
        ]

    def assert_no_orphans(self, seconds: float = 30.0) -> None:
        """Assert that nothing of the run is left; workers of a killed process notice within seconds."""
        deadline = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > deadline:
                left = self.processes()
                self.kill()
                raise AssertionError(f"still alive after {seconds:.0f} s: {left}")
            time.sleep(0.1)

    def text(self) -> str:
        """What all processes wrote."""
        return "\n".join(path.read_text(errors="replace") for path in self.logs if path.exists())

    def status(self) -> dict[str, Any]:
        """Content of ``status.json``."""
        return json.loads((self.folder / "status.json").read_text())

    def assert_ok(self, state: str = "completed") -> "Job":
        """Assert the state, and that all processes ended with 0 or with 128 + the signal that stopped them."""
        assert self.status()["state"] == state, self.text()
        reason = self.status().get("reason", "")
        code = 128 + signal.Signals[reason] if reason in signal.Signals.__members__ else 0
        assert self.codes == [code] * len(self.pids), self.text()
        assert leftovers(self.folder) == []
        return self

    def assert_failed(self, *words: str) -> "Job":
        """Assert that every process failed, and that the output has all the words and no dangerous advice."""
        assert 0 not in self.codes, self.text()
        text = self.text()
        for word in words:
            assert word in text, f"{word!r} is not in:\n{text}"
        assert "weights_only" not in text, text
        return self


class Starter:
    """Starts runs: forks of one process that has imported everything, or real launchers."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder = folder
        self.config = config
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE")}
        self._server: subprocess.Popen | None = None
        self._launchers: dict[int, subprocess.Popen] = {}
        self._count = 0

    def start(self, *opts: str, out: Path, world: int = 1, **request: Any) -> Job:
        """Start a run of ``world`` processes.

        Args:
            opts: ``KEY=VALUE`` settings and flags with their values.
            out: output folder of the run's parent (``--output``).
            world: number of processes.
            request: ``faults``, ``env``, ``program`` ('main'), ``argv`` (instead of opts and out).
        """
        port = free_port()
        pids, logs = [], []
        for rank in range(world):
            layout = (
                {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": world,
                    "LOCAL_WORLD_SIZE": world,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                if world > 1
                else {}
            )
            logs.append(self._new_log(rank))
            full = self._request(opts, out, **request)
            full["env"] = {key: str(value) for key, value in (layout | full["env"]).items()}
            full["output"] = str(logs[-1])
            pids.append(self._ask({"start": full}))
        return Job(self, pids, run_folder(out, opts), logs)

    def run(self, *opts: str, out: Path, world: int = 1, seconds: float = PATIENCE, **request: Any) -> Job:
        """Start a run and wait for its end."""
        return self.start(*opts, out=out, world=world, **request).wait(seconds)

    def launch(
        self, *opts: str, out: Path, torchrun: Sequence[str] = (), host: Sequence[str] = (), **request: Any
    ) -> Job:
        """Start a run as real processes.

        Args:
            opts, out, request: as in ``start``.
            torchrun: its arguments; without any, no launcher is used.
            host: command in front of the program, which runs it elsewhere.
        """
        full = self._request(opts, out, **request)
        words = [str(DRIVER), json.dumps(full)]
        if torchrun:
            words = ["-m", "torch.distributed.run", *torchrun, *words]
        marker = uuid.uuid4().hex
        log = self._new_log(0)
        environment = {**self._environment, **full["env"], "FAULTS_RUN": marker}
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [*host, sys.executable, *words],
                cwd=ROOT,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        self._launchers[process.pid] = process
        return Job(self, [process.pid], run_folder(out, opts), [log], marker)

    def poll(self, pid: int) -> int | None:
        """Return code of a process that was started here, None while it runs."""
        if pid in self._launchers:
            return self._launchers[pid].poll()
        return self._ask({"poll": pid})

    def close(self) -> None:
        """End the serving process."""
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(30)

    def _request(
        self,
        opts: Sequence[str],
        out: Path,
        *,
        faults: Sequence[Fault] = (),
        env: dict[str, str] | None = None,
        program: str = "main",
        argv: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        if argv is None:
            settings = [word for word in opts if re.fullmatch(r"[A-Z][A-Z_.]*=.*", word)]
            flags = [word for word in opts if word not in settings]
            argv = ["--cfg", str(self.config), "--output", str(out), *flags]
            argv += ["--opts", *settings] if settings else []
        return {"program": program, "argv": list(argv), "faults": list(faults), "env": env or {}}

    def _ask(self, message: dict[str, Any]) -> Any:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(DRIVER), "--serve"],
                cwd=ROOT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
            )
        self._server.stdin.write(json.dumps(message) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def _new_log(self, rank: int) -> Path:
        self._count += 1
        return self.folder / f"run{self._count:03d}_rank{rank}.txt"


def run_folder(out: Path, opts: Sequence[str] = ()) -> Path:
    """Output folder of a run of the tiny config."""
    tag = opts[list(opts).index("--tag") + 1] if "--tag" in opts else "default"
    return Path(out) / "tiny" / tag


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def state_hash(path: Path, ignore: Sequence[str] = ()) -> str:
    """SHA-256 over the whole training state of a checkpoint: every tensor, counter and random stream."""
    payload = load_checkpoint(path)
    digest = hashlib.sha256()
    for part in _walk({key: payload[key] for key in STATE if key not in ignore}):
        digest.update(part)
    return digest.hexdigest()


def differences(first: Path, second: Path) -> list[str]:
    """Names of the entries in which two checkpoints differ, for messages."""
    first, second = (load_checkpoint(path) for path in (first, second))
    return [key for key in STATE if list(_walk(first[key])) != list(_walk(second[key]))]


def assert_same_state(path: Path, reference: Path, ignore: Sequence[str] = ()) -> None:
    """Assert that two checkpoints hold the same training state to the last bit."""
    same = state_hash(path, ignore) == state_hash(reference, ignore)
    assert same, f"{path} differs in {differences(path, reference)}"


def figures(folder: Path) -> list[dict]:
    """What metrics.jsonl says about the training, without times."""
    timed = {"images_per_second", "data_wait", "memory_mib", "seconds"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def leftovers(folder: Path) -> list[str]:
    """Temporary files in a folder."""
    return sorted(path.name for path in folder.iterdir() if ".tmp" in path.name)


def steps(folder: Path) -> list[int]:
    """Numbers of the step files in a folder."""
    return sorted(int(path.stem.rpartition("_")[2]) for path in folder.glob("checkpoint_step_*.pth"))


def step_file(folder: Path, step: int) -> Path:
    """Path of a step file."""
    return folder / f"checkpoint_step_{step:09d}.pth"


def _walk(value: Any) -> Iterator[bytes]:
    """Bytes that identify a value made of dicts, sequences, tensors and plain types."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield repr(key).encode()
            yield from _walk(value[key])
    elif isinstance(value, (list, tuple)):
        yield b"["
        for item in value:
            yield from _walk(item)
        yield b"]"
    elif isinstance(value, torch.Tensor):
        yield repr((value.dtype, tuple(value.shape))).encode()
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    else:
        yield repr(value).encode()


def _all_processes() -> Iterator[tuple[int, int, str]]:
    """(process id, session id, environment) of all living processes that this user may look at."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            environment = (folder / "environ").read_text(errors="replace")
        except OSError:
            continue
        if fields[0] != "Z":
            yield int(folder.name), int(fields[3]), environment
