"""A signal that comes while the run begins."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from elastic_ckpt.notices import SourceEvent
from elastic_ckpt.notices.signals import SignalSource, hold_signals
from elastic_ckpt.policy.deadline import Notice

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_early_signal_is_held_and_counts_from_its_arrival() -> None:
    hold_signals()
    began = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    reported: list[SourceEvent] = []
    source = SignalSource(30.0)
    source.start(reported.append)
    assert source.pending and reported == []
    source.deliver()
    [event] = reported
    assert isinstance(event, Notice) and event.reason == "SIGTERM"
    assert event.deadline - 30.0 == pytest.approx(began, abs=2)
    source.deliver()
    assert len(reported) == 1


def test_a_later_signal_is_reported_as_usual() -> None:
    hold_signals()
    reported: list[SourceEvent] = []
    source = SignalSource(30.0)
    source.start(reported.append)
    os.kill(os.getpid(), signal.SIGUSR1)
    source.deliver()
    assert [event.reason for event in reported] == ["SIGUSR1"]
