"""How long the waits of a run that ends may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_ckpt.policy.deadline import Notice, StopNow
from elastic_ckpt.supervisor.preemption import Preemption


class World(Preemption):
    """A clock, and notices that have arrived."""

    def __init__(self) -> None:
        self.now = 100.0
        self.arrived: list[Notice | StopNow] = []
        clock = SimpleNamespace(monotonic=lambda: self.now)
        some = SimpleNamespace(note=lambda event: None, node=SimpleNamespace())
        super().__init__(30.0, *(cast(Any, one) for one in (clock, some, some, some)))

    @property
    def pending(self) -> bool:
        return bool(self.arrived)

    def take_in(self, now: float, lead: Callable[[], float]) -> Iterator[Notice | StopNow]:
        while self.arrived:
            yield self.arrived.pop()

    def wait(self, seconds: float, *, ends: bool = True) -> Callable[[], float]:
        return self.waiting(seconds, self, ends=ends)


@pytest.fixture
def world() -> World:
    return World()


def test_notice_during_the_last_waits_shortens_them(world: World) -> None:
    left = world.wait(5.0)
    world.now += 1.0
    assert left() == 4.0
    world.arrived.append(Notice("signal", "SIGTERM", world.now + 2.0))
    assert left() == 0.5 and not world.pending
    world.now += 0.5
    assert left() == 0.0


def test_second_interrupt_is_seen_during_the_last_waits(world: World) -> None:
    left = world.wait(5.0)
    world.arrived.append(StopNow())
    left()
    assert world.stops_at_once


def test_wait_of_a_run_that_continues_leaves_the_notice_to_the_loop(world: World) -> None:
    left = world.wait(5.0, ends=False)
    world.now += 1.0
    world.arrived.append(Notice("signal", "SIGTERM", world.now + 20.0))
    assert left() < 0 and world.pending
