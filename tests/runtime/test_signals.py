"""Requests to stop: signals only set a flag, the clock asks too, and handlers are put back."""

import os
import signal
import time

import pytest

from utils.runtime.signals import JOB_SIGNALS, StopRequest


def handlers() -> list:
    return [signal.getsignal(number) for number in JOB_SIGNALS]


@pytest.mark.parametrize("number", JOB_SIGNALS, ids=lambda number: number.name)
def test_signal_asks_for_a_stop(number):
    before = handlers()
    with StopRequest() as stop:
        assert (stop.poll(), stop.agreed) == ("", "")
        os.kill(os.getpid(), number)
        assert stop.agreed == ""  # nothing happens inside the handler
        assert stop.poll() == stop.agreed == number.name
        assert stop.poll() == number.name
    assert handlers() == before


def test_more_signals_change_nothing():
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.poll() in ("SIGTERM", "SIGUSR1")


def test_second_interrupt_is_the_ordinary_one():
    before = handlers()
    with StopRequest() as stop:
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
    with StopRequest(max_minutes=2.0) as stop:
        assert stop.poll() == ""
        monkeypatch.setattr(time, "monotonic", lambda: now + 121)
        assert stop.poll() == "TRAIN.MAX_RUN_MINUTES reached"
    with StopRequest() as stop:
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
