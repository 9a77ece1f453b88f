"""A rank's own work in a step, apart from its waiting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.training import step_timer as module
from elastic_ckpt.training.step_timer import SAMPLED, StepTimer


class Clock:
    def __init__(self):
        self.now = 1

    def monotonic_ns(self) -> int:
        return self.now

    def after(self, milliseconds: float) -> None:
        self.now += int(milliseconds * 1e6)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic_ns", clock.monotonic_ns)
    return clock


def slot_of(board: Board):
    return board.read_slot(0)


def a_step(timer: StepTimer, clock: Clock, model: nn.Module, micro_batches: int = 1) -> None:
    """3 ms of fetching, 5 of computing, 20 of waiting; then 2 of the optimizer."""
    for index in range(micro_batches):
        timer.fetching()
        clock.after(3)
        timer.fetched()
        timer.handed_out()
        clock.after(5)
        model(torch.ones(1, 2)).sum().backward()
        clock.after(20)
        if index == micro_batches - 1:
            timer.optimizing()
            clock.after(2)
        timer.taken_back()
    timer.stepped()


def test_waiting_is_not_counted(clock: Clock) -> None:
    board, model = Board.private(), nn.Linear(2, 1)
    timer = StepTimer(board.rank_slot(0), model)
    for _ in range(3):
        a_step(timer, clock, model)
    assert slot_of(board).busy_ns == pytest.approx(10e6)
    assert slot_of(board).step_ns == pytest.approx(30e6)


def test_micro_batches_add_up(clock: Clock) -> None:
    board, model = Board.private(), nn.Linear(2, 1)
    timer = StepTimer(board.rank_slot(0), model)
    for _ in range(3):
        a_step(timer, clock, model, micro_batches=2)
    assert slot_of(board).busy_ns == pytest.approx(18e6)


def test_a_save_between_two_steps_is_not_counted(clock: Clock) -> None:
    board, model = Board.private(), nn.Linear(2, 1)
    timer = StepTimer(board.rank_slot(0), model)
    for _ in range(2):
        a_step(timer, clock, model)
    timer.interrupted()
    clock.after(5000)
    for _ in range(2):
        a_step(timer, clock, model)
    assert slot_of(board).step_ns == pytest.approx(30e6)


def test_without_gradients_everything_counts_as_work(clock: Clock) -> None:
    board = Board.private()
    timer = StepTimer(board.rank_slot(0), nn.Identity())
    for _ in range(3):
        a_step(timer, clock, nn.Linear(2, 1))
    assert slot_of(board).busy_ns == pytest.approx(30e6)


class Event:
    """A device's: it is done only when the test says so."""

    done = True

    def __init__(self, clock: Clock):
        self.clock = clock
        self.at = 0
        self.records = 0

    def record(self) -> None:
        self.at = self.clock.now
        self.records += 1

    def query(self) -> bool:
        return Event.done

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) / 1e6


def test_on_a_device_some_steps_are_timed_by_its_clock(clock: Clock) -> None:
    board, model = Board.private(), nn.Linear(2, 1)
    events = []

    def make() -> Event:
        events.append(Event(clock))
        return events[-1]

    timer = StepTimer(board.rank_slot(0), model, make)
    for _ in range(2 * SAMPLED + 2):
        a_step(timer, clock, model, micro_batches=2)
    # From the first micro-batch's begin to the last gradient: 5 + 20 + 3 + 5, and 6 of fetching.
    assert slot_of(board).busy_ns == pytest.approx(39e6)
    assert events[0].records == 3
    assert events[1].records == 6


def test_a_device_that_lags_is_read_later(clock: Clock, monkeypatch) -> None:
    board, model = Board.private(), nn.Linear(2, 1)
    timer = StepTimer(board.rank_slot(0), model, lambda: Event(clock))
    monkeypatch.setattr(Event, "done", False)
    for _ in range(3):
        a_step(timer, clock, model)
    assert slot_of(board).busy_ns == 0
    monkeypatch.setattr(Event, "done", True)
    a_step(timer, clock, model)
    assert slot_of(board).busy_ns == pytest.approx(8e6)


def test_a_device_error_does_not_fail_the_job(clock: Clock) -> None:
    class Broken(Event):
        def elapsed_time(self, other: Event) -> float:
            raise RuntimeError("CUDA error: invalid resource handle")

    board, model = Board.private(), nn.Linear(2, 1)
    timer = StepTimer(board.rank_slot(0), model, lambda: Broken(clock))
    for _ in range(3):
        a_step(timer, clock, model)
    assert slot_of(board).step_ns == pytest.approx(30e6)


def test_a_sampled_step_that_is_interrupted_is_dropped(clock: Clock) -> None:
    board, model = Board.private(), nn.Linear(2, 1)
    timer = StepTimer(board.rank_slot(0), model, lambda: Event(clock))
    a_step(timer, clock, model)
    timer.fetching()
    timer.fetched()
    timer.handed_out()
    timer.interrupted()
    clock.after(5000)
    for _ in range(SAMPLED + 2):
        a_step(timer, clock, model)
    assert slot_of(board).busy_ns == pytest.approx(8e6)
