"""Requests to stop: at once while the run starts, after an update while it trains; the clock asks too."""

import os
import signal
import time

import pytest

from utils.runtime.signals import JOB_SIGNALS, Interrupted, StopRequest


def handlers() -> list:
    return [signal.getsignal(number) for number in JOB_SIGNALS]


def training(**options: float) -> StopRequest:
    stop = StopRequest(**options)
    stop.begin_training()
    return stop


@pytest.mark.parametrize("number", JOB_SIGNALS, ids=lambda number: number.name)
def test_signal_asks_for_a_stop(number):
    before = handlers()
    with training() as stop:
        assert (stop.poll(), stop.agreed, stop.exit_code) == ("", "", 0)
        os.kill(os.getpid(), number)
        assert stop.agreed == ""  # nothing happens inside the handler
        assert stop.poll() == stop.agreed == number.name
        assert stop.poll() == number.name
        assert stop.exit_code == 128 + number
    assert handlers() == before


def test_the_user_is_told_once(capfd):
    with training():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert capfd.readouterr().err == "SIGTERM: stop requested, the run saves and ends after this update\n"


@pytest.mark.parametrize("number", JOB_SIGNALS, ids=lambda number: number.name)
def test_signal_while_starting_ends_at_once(number):
    before = handlers()
    with pytest.raises(Interrupted, match=number.name) as info, StopRequest():
        os.kill(os.getpid(), number)
    assert info.value.number == number
    assert handlers() == before


def test_more_signals_while_starting_do_not_disturb_the_end():
    with StopRequest():
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)


def test_hangup_stays_ignored_under_nohup():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with training() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.poll() == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_exit_code_under_torchrun_is_not_a_failure(monkeypatch):
    """torchrun --max-restarts would start a run again that was asked to stop."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with training() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.poll(), stop.exit_code) == ("SIGTERM", 0)


def test_more_signals_change_nothing():
    with training() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.poll() in ("SIGTERM", "SIGUSR1")


def test_second_interrupt_is_the_ordinary_one():
    before = handlers()
    with training() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_handlers_are_put_back_after_an_error():
    before = handlers()
    with pytest.raises(ValueError, match="inside"), StopRequest():
        raise ValueError("inside")
    assert handlers() == before


def test_time_limit(monkeypatch):
    now = time.monotonic()
    with training(max_minutes=2.0) as stop:
        assert stop.poll() == ""
        monkeypatch.setattr(time, "monotonic", lambda: now + 121)
        assert stop.poll() == "TRAIN.MAX_RUN_MINUTES reached"
        assert stop.exit_code == 0
    with training() as stop:
        monkeypatch.setattr(time, "monotonic", lambda: now + 1e9)
        assert stop.poll() == ""


def test_saving_is_due_by_the_clock(monkeypatch):
    now = time.monotonic()
    stop = StopRequest(save_minutes=1.0)
    stop.poll()
    assert not stop.save_due
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    stop.poll()
    assert stop.save_due
    stop.saved()
    assert not stop.save_due
    stop.poll()
    assert not stop.save_due
    monkeypatch.setattr(time, "monotonic", lambda: now + 122)
    stop.poll()
    assert stop.save_due
