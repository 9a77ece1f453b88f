"""The end of a finished job waits for its Prometheus, within bounds."""

from __future__ import annotations

import os
import signal
import threading
import time

from elastic_ckpt.supervisor.metrics import last_look
from elastic_ckpt.supervisor.metrics.last_look import LastLook


def test_without_a_reader_nothing_is_waited_for() -> None:
    look = LastLook()
    assert not look.wait()
    look.looked()  # once, by hand
    began = time.monotonic()
    assert not look.wait()
    assert time.monotonic() - began < 0.05


def twice(monkeypatch, every: float) -> LastLook:
    """Return one whose reader has just looked, so long after the look before."""
    look = LastLook()
    now = time.monotonic()
    for moment in (now - every, now):
        monkeypatch.setattr(last_look.time, "monotonic", lambda moment=moment: moment)
        look.looked()
    monkeypatch.undo()
    return look


def test_next_look_ends_the_wait(monkeypatch) -> None:
    look = twice(monkeypatch, 30.0)
    threading.Timer(0.2, look.looked).start()
    began = time.monotonic()
    assert look.wait()
    assert time.monotonic() - began < 10


def test_reader_that_has_gone_and_a_rare_one_are_not_waited_for(monkeypatch) -> None:
    assert not twice(monkeypatch, 0.1).wait()  # gives up after a moment
    began = time.monotonic()
    assert not twice(monkeypatch, 300.0).wait()
    assert time.monotonic() - began < 5


def test_signal_ends_the_wait_and_not_the_process(monkeypatch) -> None:
    look = twice(monkeypatch, 30.0)
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    with look.ended_by_signals():
        timer.start()
        assert not look.wait()
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGTERM) is before
