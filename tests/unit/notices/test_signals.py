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
    told: list[SourceEvent] = []
    source = SignalSource(30.0)
    source.start(told.append)
    assert source.pending and told == []
    source.deliver()
    [word] = told
    assert isinstance(word, Notice) and word.reason == "SIGTERM"
    assert word.deadline - 30.0 == pytest.approx(began, abs=2)
    source.deliver()
    assert len(told) == 1


def test_a_later_signal_is_reported_as_usual() -> None:
    hold_signals()
    told: list[SourceEvent] = []
    source = SignalSource(30.0)
    source.start(told.append)
    os.kill(os.getpid(), signal.SIGUSR1)
    source.deliver()
    assert [word.reason for word in told] == ["SIGUSR1"]
