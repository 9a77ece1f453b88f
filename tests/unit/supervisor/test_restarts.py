"""A checkpoint is set aside without holding the loop up, and not after that was given up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.policy.failure import Failure
from elastic_ckpt.policy.restart import RestartAction
from elastic_ckpt.supervisor.ports import Clock
from elastic_ckpt.supervisor.restarts import FALL_BACK_SECONDS, Restarts


class Scene(Clock):
    """A directory whose storage does not answer, a clock, and what the user is told."""

    fallen_back: str | None = None

    def __init__(self) -> None:
        self.now = 100.0
        self.asked: list[str] = []
        self.may_cancel = True
        self.said: list[str] = []
        self.node = SimpleNamespace(message="")
        memory: Any = SimpleNamespace(hurry=lambda: None, over=True, forget=lambda key: True)
        anything: Any = self
        self.restarts = Restarts(9, self, anything, memory, anything)
        fault = Failure(0, -11, "", stepped=True, steps=3, step=8, newest=(0, 6))
        self.actions = [self.restarts.decide(fault)[0].action for _ in range(2)]

    def monotonic(self) -> float:
        return self.now

    def fall_back(self, why: str, forget: Callable[[Any], bool], session: str) -> None:
        self.asked.append(why)

    def cancel_fall_back(self) -> bool:
        return self.may_cancel

    def say(self, line: str) -> None:
        self.said.append(line)

    def update(self, message: str) -> None:
        self.node.message = message

    def is_done(self, after: float = 0.0) -> bool:
        self.now += after
        record: Any = self
        return self.restarts.take_an_older_one(record, "")


@pytest.fixture
def scene() -> Scene:
    found = Scene()
    assert found.actions == [RestartAction.RESTART, RestartAction.FALL_BACK]
    return found


def test_the_next_start_waits_until_the_checkpoint_is_set_aside(scene: Scene) -> None:
    assert not scene.is_done() and not scene.is_done(1.0)
    scene.fallen_back = "setting epoch-0_step-6 aside"
    assert scene.is_done()
    assert (scene.asked, scene.said) == (["step 8 failed twice"], ["setting epoch-0_step-6 aside"])
    assert scene.is_done() and len(scene.asked) == 1


def test_a_storage_that_does_not_answer_is_given_up_with_a_message(scene: Scene) -> None:
    assert not scene.is_done() and not scene.is_done(FALL_BACK_SECONDS - 1)
    assert scene.is_done(2.0)
    assert scene.said == [
        "step 8 failed twice: the storage does not answer, resuming from the newest checkpoint"
    ]


def test_one_that_is_under_way_is_waited_for_with_a_message(scene: Scene) -> None:
    scene.may_cancel = False
    assert not scene.is_done()
    assert not any(scene.is_done(FALL_BACK_SECONDS) for _ in range(5))
    [line] = scene.said
    assert line.startswith("waiting for the storage, which does not answer")
    scene.fallen_back = ""
    assert scene.is_done()
