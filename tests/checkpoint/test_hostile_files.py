"""Damaged and hostile checkpoints: what loads is what was saved, and everything else is refused in one message."""

import io
import os
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.test_checkpoint import FACTS, equal, make_state, tensors
from utils.checkpoint.capture import capture, read_training_state, restore
from utils.checkpoint.files import load_checkpoint, write_checkpoint
from utils.checkpoint.resume import check_classes
from utils.checkpoint.store import BEST, LAST, CheckpointStore
from utils.errors import CheckpointError
from utils.training.records import record_epoch, trim_metrics
from utils.training.state import Progress


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "state.pth"
    write_checkpoint(path, capture(make_state(), FACTS))
    return path


def same(first: Any, second: Any) -> bool:
    """Whether two nested values are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


def loads_exactly_or_is_refused(path: Path, good: dict[str, Any], what: str) -> bool:
    """Return whether a file loads; assert that it then holds the values of ``good``, or is refused in one line."""
    try:
        payload = load_checkpoint(path)
    except CheckpointError as refusal:
        message = str(refusal)
    else:
        assert same(payload, good), f"{what} loads something else"
        return True
    assert "\n" not in message, what
    return False


def directory(data: bytes) -> list[int]:
    """Positions of the entries of a zip archive's directory."""
    end = data.rfind(b"PK\5\6")
    (position,) = struct.unpack_from("<I", data, end + 16)
    found = []
    while data[position : position + 4] == b"PK\1\2":
        found.append(position)
        position += 46 + sum(struct.unpack_from("<HHH", data, position + 28))
    return found


def test_a_member_marked_as_a_folder_gives_no_unwritten_memory(saved: Path) -> None:
    good, data = load_checkpoint(saved), saved.read_bytes()
    entries = directory(data)
    assert len(entries) > 20
    for position in entries:
        changed = bytearray(data)
        changed[position + 38] ^= 0x10  # the attribute "directory"
        saved.write_bytes(changed)
        loads_exactly_or_is_refused(saved, good, f"member at {position}")


def test_values_are_compared_with_the_digest_whatever_the_archive_says(saved: Path) -> None:
    payload = torch.load(saved, weights_only=True)
    name = next(iter(payload["model"]))
    payload["model"][name].view(-1)[0] += 1
    torch.save(payload, saved)  # a sound archive with right checksums and the old digest
    with pytest.raises(CheckpointError, match="digest"):
        load_checkpoint(saved)


def test_loaded_tensors_own_their_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    views = {"row": base[4:8], "transposed": base.view(3, 4).t(), "expanded": torch.ones(1).expand(5)}
    torch.save(views, tmp_path / "views.pth")
    loaded = load_checkpoint(tmp_path / "views.pth")
    for name, view in views.items():
        assert torch.equal(loaded[name], view)
        assert loaded[name].is_contiguous()
        assert loaded[name].untyped_storage().nbytes() == view.numel() * 4


BOMBS = {
    "bytearray": b"\x80\x02}X\1\0\0\0ac__builtin__\nbytearray\n\x8a\x05"
    + (6 * 10**9).to_bytes(5, "little")
    + b"\x85Rs.",
    "doubling": b"\x80\x02]q\0" + b"".join(b"(h%ch%ce" % (0, 0) for _ in range(3)) + b".",
    "code": b"\x80\x02cos\nsystem\nX\4\0\0\0true\x85R.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", BOMBS[name])
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def moment(payload: dict[str, Any], name: str = "exp_avg") -> tuple[dict[str, Any], torch.Tensor]:
    """The optimizer's entry of the largest parameter, and one of its moments."""
    state = payload["optimizer"]["state"]
    entry = state[max(state, key=lambda i: state[i][name].numel())]
    return entry, entry[name]


def set_moment(payload: dict[str, Any], change: Callable[[torch.Tensor], Any], name: str = "exp_avg") -> None:
    entry, value = moment(payload, name)
    entry[name] = change(value)


def reverse_parameters(payload: dict[str, Any]) -> None:
    group = payload["optimizer"]["param_groups"][0]
    group["params"] = group["params"][::-1]


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a moment without dimensions": (lambda p: set_moment(p, lambda t: torch.tensor(0.0)), "exp_avg has shape"),
    "a moment that is text": (lambda p: set_moment(p, lambda t: "gone"), "not a tensor"),
    "an infinite moment": (lambda p: set_moment(p, lambda t: t * float("inf") + 1), "infinite or undefined"),
    "a moment of another type": (lambda p: set_moment(p, lambda t: t.double()), "has type"),
    "a negative square": (lambda p: set_moment(p, lambda t: t - 1, "exp_avg_sq"), "below 0"),
    "more updates than the run": (lambda p: set_moment(p, lambda t: t + 9, "step"), "not a number of updates"),
    "parameters in another order": (reverse_parameters, "another order"),
    "a missing moment": (lambda p: moment(p)[0].pop("exp_avg"), "missing"),
    "a negative epoch": (lambda p: p["progress"].update(epoch=-1), "progress.epoch"),
    "an accuracy of 500": (lambda p: p["progress"].update(best_acc1=500.0), "progress.best_acc1"),
    "samples before any update": (lambda p: p["progress"].update(global_step=0), "global_step"),
    "more skipped than done": (lambda p: p["guard"].update(skipped=7), "guard.skipped"),
    "a random state that is text": (lambda p: p["rank_state"][0]["rng"].update(torch="x"), "rng.torch"),
    "a cut random state": (lambda p: p["rank_state"][0]["rng"].update(torch=torch.zeros(3, dtype=torch.uint8)), "rng"),
    "a Python stream with a tensor": (
        lambda p: p["rank_state"][0]["rng"].update(python=(*p["rank_state"][0]["rng"]["python"][:2], torch.ones(2))),
        "rng.python",
    ),
    "means of another length": (lambda p: p["rank_state"][0].update(means=[1.0]), "means"),
    "another number of processes": (lambda p: p.update(world_size=2), "rank_state"),
    "versions that are a number": (lambda p: p.update(versions=5), "versions"),
    "classes that are a number": (lambda p: p.update(classes=5), "classes"),
    "a config of 2 MB": (lambda p: p.update(config="A: 1\n" * 400_000), "config"),
    "a config of aliases": (lambda p: p.update(config="A: &a [1]\nB: [*a, *a]\n"), "aliases"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_state_is_checked_whole_before_anything_is_touched(saved: Path, name: str) -> None:
    change, words = FAULTS[name]
    payload = load_checkpoint(saved)
    change(payload)
    write_checkpoint(saved, payload)
    state, untouched = make_state(seed=1), make_state(seed=1)
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=words) as caught:
        restore(state, read_training_state(saved), saved)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert equal(state, untouched)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layout", ("transposed", "expanded"))
def test_the_layout_of_a_moment_in_the_file_does_not_matter(saved: Path, layout: str) -> None:
    payload = load_checkpoint(saved)
    change = {
        "transposed": lambda t: t.t().contiguous().t(),
        "expanded": lambda t: torch.full((1, 1), 0.25).expand(t.shape),
    }[layout]
    set_moment(payload, change)
    expected = moment(payload)[1].clone()
    torch.save({k: v for k, v in payload.items() if k != "digest"}, saved)
    state = make_state(seed=1)
    restore(state, read_training_state(saved), saved)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    found = max((state.optimizer.state[p]["exp_avg"] for p in parameters), key=torch.Tensor.numel)
    assert torch.equal(found, expected)
    assert all(state.optimizer.state[p]["exp_avg"].stride() == p.stride() for p in parameters)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One random change: bits, a zeroed or repeated stretch, a cut, or a change in the directory."""
    changed, kind = bytearray(data), draw.randrange(5)
    position, length = draw.randrange(len(data)), draw.randrange(1, 200)
    if kind == 0:
        for _ in range(draw.choice((1, 1, 8))):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        changed[position : position + length] = bytes(len(changed[position : position + length]))
    elif kind == 2:
        changed[position:position] = changed[position : position + length]
    elif kind == 3:
        del changed[position:]
    else:
        changed[draw.choice(directory(data)) + draw.randrange(46)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def fuzz(saved: Path, tries: int, seed: int) -> int:
    """Return how many of the mutated files were refused; the others must load exactly."""
    good, data, draw, refused = load_checkpoint(saved), saved.read_bytes(), random.Random(seed), 0
    for number in range(tries):
        saved.write_bytes(mutated(data, draw))
        refused += not loads_exactly_or_is_refused(saved, good, f"try {number} of seed {seed}")
    return refused


def test_mutated_files_load_exactly_or_not_at_all(saved: Path) -> None:
    assert fuzz(saved, 150, seed=3) > 50


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(10, 15))
def test_thousands_of_mutated_files(saved: Path, seed: int) -> None:
    assert fuzz(saved, 1000, seed=seed) > 300


# mutations behind right checksums: of the pickle's bytes, and of single entries


def rewritten(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """An archive with a changed pickle and right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(source.read(name)) if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()


def mutated_pickle(data: bytes, draw: random.Random) -> bytes:
    """A few random changes: bits, opcodes, repeated and removed stretches."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        position, kind = draw.randrange(len(changed)), draw.randrange(4)
        if kind == 0:
            changed[position] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[position] = draw.choice(b"()]}.NcRbqhrjtu0esQ\x80\x81\x85\x86\x87\x88\x8aKJMXG")
        elif kind == 2:
            start = draw.randrange(len(changed))
            changed[position:position] = changed[start : start + draw.randrange(1, 40)]
        else:
            del changed[position : position + draw.randrange(1, 20)]
    return bytes(changed)


def entries(node: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all entries of a nested payload; of a long list, of its first five."""
    found = [path] if path else []
    if isinstance(node, dict):
        pairs = list(node.items())
    else:
        pairs = list(enumerate(node))[:5] if isinstance(node, (list, tuple)) else []
    return found + [inner for key, value in pairs for inner in entries(value, (*path, key))]


def replaced(node: Any, path: tuple, change: Callable[[Any], Any]) -> Any:
    """A copy of a nested payload with one entry changed."""
    if not path:
        return change(node)
    copied = dict(node) if isinstance(node, dict) else list(node)
    copied[path[0]] = replaced(node[path[0]], path[1:], change)
    return tuple(copied) if isinstance(node, tuple) else copied


def odd_value(old: Any, draw: random.Random) -> Any:
    """Something else in the place of a value: of another type, range, shape, layout or set of keys."""
    odd = [None, True, -1, 10**30, float("nan"), "", "\n\nA: [", b"x", [], (), {1: 2}, {"a": 1}, [[[[]]]]]
    odd += [torch.randn(shape) for shape in ((), (3,), (3, 4), (0,))]
    odd += [torch.empty(3, 4, device="meta"), torch.zeros(1).expand(3, 4), "A: 1\n" * 100_000, torch.float32, {1}]
    if isinstance(old, torch.Tensor):
        odd += [old.double(), old.half(), old[None], old * float("nan"), -old, old.flatten()[:1]] * 3
    elif isinstance(old, (int, float)):
        odd += [old + 1, old - 1, old + 1000, old - 1000, old + 0.5] * 3
    elif isinstance(old, dict) and old:
        odd += [{**old, "another": 1}, {**old, 7: 1}, {**old, "\n": 1}, dict(list(old.items())[1:])] * 4
    elif isinstance(old, (list, tuple)) and old:
        odd += [old[::-1], old[:-1], (*old, 1)] * 4
    return draw.choice(odd)


def continues_or_is_refused(path: Path, what: str) -> bool:
    """Return whether a file can be continued from; assert that it trains on then, or is refused in one line."""
    state, untouched = make_state(seed=1), make_state(seed=1)
    try:
        payload = read_training_state(path)
        check_classes(FACTS["classes"], payload, path)
        restore(state, payload, path)
    except CheckpointError as refusal:
        message = str(refusal)
    else:
        message = ""
    if message:
        assert "\n" not in message, what
        assert str(path) in message, what
        assert equal(state, untouched), what
        return False
    state.guard.begin({})
    loss = state.model(torch.randn(8, 4)).square().mean()
    loss.backward()
    state.guard.step_unless_nonfinite(state.optimizer, state.scaler, loss.detach())
    assert all(torch.isfinite(tensor).all() for tensor in tensors(state)), what
    return True


def fuzz_behind_checksums(saved: Path, tries: int, seed: int) -> int:
    """Return how many mutated pickles and entries were refused, within bounded time and memory, in a forked child.

    A child, so that a crash fails one test and its memory can be measured.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(_fuzz_behind_checksums(saved, tries, random.Random(seed))).encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}"[:2000].encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the reader was killed by signal {os.WTERMSIG(status)}"
    assert answer.isdigit(), answer
    return int(answer)


def _fuzz_behind_checksums(saved: Path, tries: int, draw: random.Random) -> int:
    data, payload, refused = saved.read_bytes(), load_checkpoint(saved), 0
    parts: dict[str, list[tuple]] = {}
    for path in entries(payload):
        parts.setdefault(path[0], []).append(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(tries):
        started = time.process_time()
        if number % 2:
            what = f"pickle {number}"
            saved.write_bytes(rewritten(data, lambda pickle: mutated_pickle(pickle, draw)))
        else:
            entry = draw.choice(parts[draw.choice(list(parts))])
            what = f"entry {entry} of try {number}"
            torch.save(replaced(payload, entry, lambda old: odd_value(old, draw)), saved)
        refused += not continues_or_is_refused(saved, what)
        assert time.process_time() - started < 10, what
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 300 * 1024, f"{grown} KiB"
    return refused


def test_mutations_behind_right_checksums_are_refused_or_harmless(saved: Path) -> None:
    assert fuzz_behind_checksums(saved, 150, seed=4) > 90


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20, 24))
def test_thousands_of_mutations_behind_right_checksums(saved: Path, seed: int) -> None:
    assert fuzz_behind_checksums(saved, 1000, seed=seed) > 600


def test_a_key_that_breaks_lines_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a\nb": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="cannot be printed"):
        load_checkpoint(tmp_path / "a.pth")


# kills between the names of a file, and side files


def store_with_two_saves(folder: Path) -> CheckpointStore:
    """A folder in which update 1 was the best, and then update 2."""
    store = CheckpointStore(folder, 2)
    for update in (1, 2):
        state = make_state()
        state.progress = Progress(global_step=update, epoch=0, samples_seen=8, best_acc1=50.0 * update, best_epoch=1)
        store.save(capture(state, FACTS), (BEST,))
    return store


def held(path: Path) -> int:
    return load_checkpoint(path)["progress"]["global_step"]


@pytest.mark.parametrize("damage", ("missing", "an older file"))
@pytest.mark.parametrize("name", (BEST, LAST))
def test_a_restart_repairs_the_names_that_a_kill_prevented(tmp_path: Path, name: str, damage: str) -> None:
    store = store_with_two_saves(tmp_path)
    (tmp_path / name).unlink()
    if damage == "an older file":
        (tmp_path / name).hardlink_to(tmp_path / "checkpoint_step_000000001.pth")
    assert held(store.newest()) == 2
    assert held(tmp_path / name) == 2


@pytest.mark.parametrize(
    "content", (b"\xff\xfe broken", b"[1]\n", None), ids=("not UTF-8", "not an object", "a folder")
)
def test_metrics_that_cannot_be_read_are_set_aside(tmp_path: Path, caplog, content: bytes | None) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if content is None else path.write_bytes(content)
    trim_metrics(path, 3)
    record_epoch(tmp_path, {"epoch": 1, "train_loss": 1.0, "lr": 0.1}, None)
    assert '"epoch": 1' in path.read_text()
    assert (tmp_path / "metrics.jsonl.aside").exists()
    assert "metrics.jsonl.aside" in caplog.text
