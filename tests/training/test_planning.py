"""Plans: batch and accumulation from images per update and memory, updates from time and measured speed."""

import dataclasses
import json
import logging
import math
import time
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

import main
from data.images.batch import build_batch_transform
from tests.builders import config_with
from tests.faults.harness import assert_same_state, step_file
from tests.tiny_run import TinyRun
from utils import assembly, rehearsal
from utils.checkpoint.files import load_checkpoint
from utils.checkpoint.resume import kept_plan
from utils.checkpoint.store import CheckpointStore
from utils.config import parse, parse_config, with_values
from utils.config.values import read_duration
from utils.errors import RunError
from utils.rehearsal import Rehearsal, rehearse
from utils.runtime import StopRequest, start_run
from utils.session import Session
from utils.training import planning
from utils.training.planning import (
    Costs,
    TimeBudget,
    batch_choices,
    largest_fitting,
    log_batch,
    small_enough,
    updates_within,
)

UNMIXED = {"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0}
# With these costs, an hour has room for 11 updates of a run of 6 per epoch, whatever else it has spent.
MEASURED = Costs(update=300.0, data_wait=0.0, epoch=0.0, evaluation=0.0, save=0.0)


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> list[Costs]:
    """Rehearse as ever, but plan with MEASURED; return a list of what was really measured."""
    original, measured = main.rehearse, []

    def rehearse(*args: Any, **options: Any) -> Costs:
        measured.append(original(*args, **options))
        return MEASURED

    monkeypatch.setattr(main, "rehearse", rehearse)
    monkeypatch.setattr("utils.rehearsal.REHEARSAL_SECONDS", 0.1)
    return measured


def sizes(total: int, world_size: int = 1, **keys: Any) -> list[tuple[int, int]]:
    """Return the choices of (batch, accumulation) for an update of ``total`` images."""
    choices = batch_choices(config_with(TRAIN__GLOBAL_BATCH=total, **keys), world_size)
    return [(choice.DATA.BATCH_SIZE, choice.TRAIN.ACCUMULATION_STEPS) for choice in choices]


# images per update


def test_the_choices_halve_the_batch_and_keep_the_update() -> None:
    assert sizes(96, 2) == [(48, 1), (24, 2), (12, 4), (6, 8), (2, 24)]
    assert sizes(96, 2, **UNMIXED) == [(48, 1), (24, 2), (12, 4), (6, 8), (3, 16)]
    assert sizes(100, **UNMIXED)[:4] == [(100, 1), (50, 2), (25, 4), (10, 10)]
    assert sizes(3 * 65536)[0] == (65536, 3)
    for total, world in ((1024, 8), (1536, 2), (360, 6)):
        assert all(batch * steps * world == total for batch, steps in sizes(total, world))


def test_without_images_per_update_the_configuration_stays() -> None:
    config = config_with(DATA__BATCH_SIZE=48)
    assert batch_choices(config, 8) == [config]


@pytest.mark.parametrize(
    ("total", "world", "keys", "nearest"),
    (
        (100, 3, UNMIXED, "99 or 102"),
        (100, 8, {}, "96 or 112"),
        (5, 8, UNMIXED, "take 8"),
        (33, 1, {}, "32 or 34"),
    ),
)
def test_an_update_that_cannot_be_divided_is_an_error_with_the_nearest_choices(total, world, keys, nearest) -> None:
    with pytest.raises(ValueError, match=rf"TRAIN.GLOBAL_BATCH is {total} .*{nearest}$"):
        sizes(total, world, **keys)


def test_the_batch_is_the_largest_that_fits_memory_and_data() -> None:
    choices = batch_choices(config_with(TRAIN__GLOBAL_BATCH=96), 1)
    tried = []

    def fits(config) -> bool:
        tried.append(config.DATA.BATCH_SIZE)
        return config.DATA.BATCH_SIZE <= 30

    assert largest_fitting(choices, fits).DATA.BATCH_SIZE == 24
    assert tried == [96, 48, 24]
    with pytest.raises(RunError, match=r"TRAIN\.GLOBAL_BATCH 96: not even a DATA\.BATCH_SIZE of 2 fits the memory"):
        largest_fitting(choices, lambda config: False)
    assert [choice.DATA.BATCH_SIZE for choice in small_enough(choices, 3, 100)][0] == 24
    with pytest.raises(ValueError, match="TRAIN.GLOBAL_BATCH is 96, but there are 90 training images"):
        small_enough(choices, 1, 90)


def test_what_is_not_equivalent_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    whole, half = batch_choices(config_with(TRAIN__GLOBAL_BATCH=8), 1)[:2]
    log_batch(whole, 1, 26)
    assert "not as" not in caplog.text
    log_batch(half, 1, 26)
    assert "BatchNorm normalises over 4 images; mixup and cutmix are drawn for every 4" in caplog.text
    assert "the last update" not in caplog.text
    log_batch(half, 1, 28)
    assert "the last update of an epoch has 4" in caplog.text


def limited_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let updates of more than ``most`` images run out of memory, at their end; return a list of what is tried."""
    original, tried = assembly.try_updates, []

    def try_updates(config, **options: Any) -> None:
        tried.append(config.DATA.BATCH_SIZE)
        original(config, **options)
        if config.DATA.BATCH_SIZE > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(assembly, "try_updates", try_updates)
    return tried


def test_a_planned_batch_trains_to_the_bits_of_one_written_by_hand(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials leave no trace, in dropped paths, average, BatchNorm, moments or random streams; a resume keeps it."""
    words = ("--opts", "TRAIN.EMA_DECAY", 0.9, "MODEL.DROP", True, "TRAIN.SAVE_STEPS", 2, "TRAIN.SAVE_KEEP", 9)
    by_hand = tiny.train("--batch-size", 4, "--accumulation-steps", 2, *words, tag="by_hand")
    with monkeypatch.context() as patch:
        tried = limited_memory(patch, most=4)
        planned = tiny.train("--global-batch", 8, *words, tag="planned")
    assert tried == [8, 4]
    assert_same_state(planned / "checkpoint_last.pth", by_hand / "checkpoint_last.pth")
    middle = step_file(planned, 4)
    tried = limited_memory(monkeypatch, most=100)
    resumed = tiny.train("--global-batch", 8, "--resume", middle, *words, tag="resumed")
    assert tried == []
    assert_same_state(resumed / "checkpoint_last.pth", by_hand / "checkpoint_last.pth")
    config = parse_config(load_checkpoint(middle)["config"], "it")
    assert (config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS, config.TRAIN.GLOBAL_BATCH) == (4, 2, 8)
    config, store = with_values(config, {"MODEL.RESUME": str(middle)}), CheckpointStore(resumed, 2)
    assert kept_plan(config, store, 1) == {"DATA.BATCH_SIZE": 4, "TRAIN.ACCUMULATION_STEPS": 2}
    assert kept_plan(config, store, 2) == {}  # another number of processes plans anew


def test_other_errors_of_a_trial_are_not_taken_for_a_lack_of_memory(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(config, **options: Any) -> None:
        raise RuntimeError("expected scalar type Float")

    monkeypatch.setattr(assembly, "try_updates", broken)
    with pytest.raises(RuntimeError, match="expected scalar type Float"):
        tiny.train("--global-batch", 8, tag="broken")
    monkeypatch.setattr("utils.rehearsal.free_memory", lambda: 1000)
    with pytest.raises(SystemExit):
        tiny.train("--global-batch", 8, tag="none")
    assert "not even a DATA.BATCH_SIZE of 2 fits the memory" in caplog.text


# time


@pytest.mark.parametrize(
    ("text", "seconds"), (("6h", 21600), ("90m", 5400), ("300s", 300), ("1h30m", 5400), ("1.5H", 5400), ("0", 0))
)
def test_durations(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ("6", "h", "6x", "30m1h", "-5m", "1e3s", "5 m"))
def test_a_time_without_unit_or_order_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"TRAIN.TIME_BUDGET is '.*', not a time such as 6h, 90m, 300s or 1h30m"):
        parse_config("", "it", {"TRAIN.TIME_BUDGET": text})


def test_as_many_updates_as_fit_with_their_evaluations_and_saves() -> None:
    costs = Costs(update=0.5, data_wait=0.1, epoch=1.0, evaluation=4.0, save=2.0)
    config = config_with(TEST__INTERVAL=2, TRAIN__SAVE_STEPS=5)
    for seconds in (9.0, 30.0, 61.5, 200.0):
        updates, needed = updates_within(seconds, costs, config, 10)
        assert needed == costs.of_run(config, updates, 10) <= seconds < costs.of_run(config, updates + 1, 10)
    # 3 epochs, the last of 5 updates: each with start and save, 5 saves within, evaluations after the 2nd and the last
    assert costs.of_run(config, 25, 10) == 25 * 0.5 + 3 * (1 + 2) + 5 * 2 + 2 * 4
    assert updates_within(61.5, costs, config, 10, done=20)[0] > updates_within(61.5, costs, config, 10)[0]
    config = config_with(TRAIN__TIME_BUDGET="5s")
    with pytest.raises(
        ValueError, match=r"TRAIN.TIME_BUDGET is 5s, of which 5 s are left, but one update .* takes 8 s"
    ):
        updates_within(5.0, costs, config, 10)


@pytest.mark.faults
def test_the_schedule_is_stretched_to_the_updates(tiny: TinyRun) -> None:
    """20 updates of a recipe of 4 epochs, 1 of warm-up, in epochs of 6: warm-up of 5, the minimum at the end."""
    words = ("TRAIN.UPDATES", 20, "TRAIN.WARMUP_EPOCHS", 1, "TRAIN.SAVE_STEPS", 1, "TRAIN.SAVE_KEEP", 50)
    folder = tiny.train("--epochs", 4, "--opts", *words, tag="stretched")
    rates = [load_checkpoint(step_file(folder, step))["lr"][0] for step in range(1, 21)]
    assert rates.index(max(rates)) == 5
    assert rates[0] < rates[4]
    assert all(earlier > later for earlier, later in zip(rates[5:], rates[6:], strict=False))
    assert rates[-1] == pytest.approx(5e-6 + (1e-3 - 5e-6) * (1 + math.cos(math.pi * 19 / 20)) / 2)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 12, 18, 20]
    assert all("val_acc1" in row for row in rows)
    assert load_checkpoint(folder / "ckpt_epoch_4.pth")["progress"]["epoch"] == 4


def test_epochs_without_mixing_are_stretched_too() -> None:
    config = config_with(TRAIN__EPOCHS=10, AUG__MIXUP_OFF_EPOCHS=2, DATA__IMG_SIZE=32)
    images, targets, indices = torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([0, 1])
    for epochs, last_mixed in ((0, 7), (5.0, 3), (25.0, 19)):
        transform = build_batch_transform(config, is_train=True, device="cpu", epochs=epochs)
        smoothed = []
        for epoch in (last_mixed, last_mixed + 1):
            found = {
                float(transform(images.clone(), targets, indices, epoch=epoch, update=update)[1].max())
                for update in range(4)
            }
            smoothed.append(len(found) == 1)  # only smoothing is left
        assert smoothed == [False, True], epochs


def test_a_time_budget_trains_to_the_bits_of_its_updates_written_by_hand(
    tiny: TinyRun, rehearsals: list[Costs], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rehearsal leaves no trace; a resumed run keeps the plan, and the time that was used counts."""
    words = ("TRAIN.EMA_DECAY", 0.9, "MODEL.DROP", True, "TRAIN.SAVE_STEPS", 4, "TRAIN.SAVE_KEEP", 9)
    by_hand = tiny.train("--opts", *words, "TRAIN.UPDATES", 11, tag="11")
    assert rehearsals == []
    whole = tiny.train("--time-budget", "1h", "--opts", *words, tag="1h")
    assert_same_state(whole / "checkpoint_last.pth", by_hand / "checkpoint_last.pth")
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in by_hand.iterdir())
    assert (measured := rehearsals.pop()).update > 0
    assert min(dataclasses.astuple(measured)) >= 0
    assert "time budget 1h:" in capsys.readouterr().out
    middle = load_checkpoint(step_file(whole, 8))
    assert 0 < middle["seconds_used"] < load_checkpoint(whole / "checkpoint_last.pth")["seconds_used"] < 600
    assert parse_config(middle["config"], "it").TRAIN.UPDATES == 11
    monkeypatch.setattr(TimeBudget, "continue_from", lambda self, seconds: before.append(seconds))
    before: list[float] = []
    resumed = tiny.train("--time-budget", "1h", "--resume", step_file(whole, 8), "--opts", *words, tag="again")
    assert before == [middle["seconds_used"]]
    assert rehearsals == []
    assert_same_state(resumed / "checkpoint_last.pth", by_hand / "checkpoint_last.pth")


@pytest.mark.faults
def test_another_budget_is_another_plan_and_needs_permission(
    tiny: TinyRun, rehearsals: list[Costs], capsys: pytest.CaptureFixture
) -> None:
    first = tiny.train("--time-budget", "1h", tag="first")
    rehearsals.clear()
    words = ("--time-budget", "2h", "--resume", first / "checkpoint_last.pth")
    with pytest.raises(SystemExit):
        tiny.train(*words, tag="longer")
    assert "TRAIN.TIME_BUDGET: 1h in the checkpoint, 2h now" in capsys.readouterr().out
    longer = tiny.train(*words, "--allow-change", "TRAIN.TIME_BUDGET", tag="longer")
    assert len(rehearsals) == 2
    end, middle = (load_checkpoint(folder / "checkpoint_last.pth") for folder in (longer, first))
    planned = parse_config(end["config"], "it").TRAIN.UPDATES - parse_config(middle["config"], "it").TRAIN.UPDATES
    # the epoch that was cut short counts as a whole one
    assert end["progress"]["global_step"] - middle["progress"]["global_step"] == planned - 1 > 5


def test_a_run_without_a_plan_is_put_together_once(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a plan makes the transform and the text of the configuration anew; TRAIN.UPDATES by hand is one, too."""
    original, planned = assembly.with_config, []

    def with_config(session: Session, config: CfgNode) -> Session:
        planned.append(config.TRAIN.UPDATES)
        return original(session, config)

    monkeypatch.setattr(assembly, "with_config", with_config)
    tiny.train("--epochs", 1, tag="no_plan")
    assert planned == []
    tiny.train("--opts", "TRAIN.UPDATES", 1, tag="one_update")
    assert planned == [1]


def test_a_rehearsal_of_slow_updates_is_short(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates that take longer than the time for measuring are done twice: once to warm up, once measured.

    What the first records load is not measured, however long that takes.
    """
    config = parse(tiny.argv(tag="slow"))[1]
    original, updates = Rehearsal.after_update, []
    monkeypatch.setattr(
        Rehearsal, "after_update", lambda *args, **options: updates.append(0) or original(*args, **options)
    )
    clock, loading = time.perf_counter, [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 100.0 - sum(loading))
    monkeypatch.setattr(rehearsal, "record_epoch", lambda *_: loading.clear())
    loops = {"train_one_epoch": main.train_one_epoch, "validate": main.validate}
    stop = StopRequest()
    with start_run(config) as run, main.build_session(config, run, stop, update=main.update) as session:
        costs = rehearse(*main.build_training(session), session, **loops, seconds=1e-9)
    assert len(updates) == 2
    assert min(costs.update, costs.evaluation, costs.save) > 0
    assert costs.epoch < 100


def test_the_end_is_predicted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(planning.time, "monotonic", lambda: clock[0])
    budget = TimeBudget(100.0)
    budget.continue_from(20.0)
    for done in range(50, 80):
        clock[0] += 1.0
        budget.check(done, 100)
    assert caplog.text == ""  # 20 s before, 21 s at update 50, 1 s each: the end is at 71 s
    clock[0] += 40.0
    for done in range(80, 101):
        clock[0] += 1.0
        budget.check(done, 100)
    assert "later than its budget of 100 s" in caplog.text
    assert len(caplog.records) == 3  # at 80, 90 and 100 %
    TimeBudget().check(1, 10)
    assert len(caplog.records) == 3
