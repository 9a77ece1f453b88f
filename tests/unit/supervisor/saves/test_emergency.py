"""Under a notice the disk is the ranks' while they write, and the drain's otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.policy.emergency import ChoiceKind, EmergencyChoice
from elastic_ckpt.protocol.messages import Ask, Command, Kill
from elastic_ckpt.protocol.slot import Outcome, Phase
from elastic_ckpt.supervisor.saves.emergency import EmergencySave

FULL, DRAIN = ChoiceKind.FULL, ChoiceKind.DRAIN_NEWEST


class World:
    """The memory tier, the adviser and the agent of a run."""

    def __init__(self) -> None:
        self.done: list[object] = []
        self.kind = FULL
        self.left_in_memory: int | None = 100
        self.saving: list[float | None] = []
        self.emergency = EmergencySave(self, self)  # type: ignore[arg-type]

    def hold(self) -> None:
        self.done.append("hold")

    def hurry(self) -> None:
        self.done.append("hurry")

    def not_on_disk(self) -> object:
        return self.left_in_memory

    def undrained_bytes(self) -> int | None:
        return self.left_in_memory

    def noticed(self, *arguments: Any) -> EmergencyChoice:
        self.saving.append(arguments[-1])
        return EmergencyChoice(self.kind, 1.0, "because")

    def send(self, command: Command) -> None:
        self.done.append(type(command))

    def turn(self, *phases: Phase, now: float = 0.0, first: bool = False) -> str:
        slots: Any = [
            SimpleNamespace(phase=phase, attached=True, outcome=Outcome.NONE) for phase in phases
        ]
        act = self.emergency.begin if first else self.emergency.choose
        return act(self, 30.0 - now, slots, now)  # type: ignore[arg-type]


def test_ranks_are_asked_before_anything_is_written() -> None:
    world = World()
    assert world.turn(Phase.TRAINING, first=True) == ""
    assert world.done == [Ask, "hurry"]


@pytest.mark.parametrize(
    ("phases", "writes"),
    [
        ((Phase.SAVING, Phase.SAVING), True),
        ((Phase.SAVING, Phase.LEAVING), True),
        ((Phase.EVALUATING, Phase.EVALUATING), False),
        ((Phase.SAVING, Phase.EVALUATING), False),  # it waits for the other, and writes nothing
        ((Phase.SAVING, Phase.TRAINING), False),
        ((Phase.LEAVING, Phase.LEAVING), False),
        ((), False),
    ],
)
def test_drain_is_held_only_while_ranks_write(phases: tuple[Phase, ...], writes: bool) -> None:
    world = World()
    world.turn(*phases)
    world.turn(*phases, now=1.0)
    assert world.done == ["hold" if writes else "hurry"]  # once: a hurry retries what failed


def test_choice_is_made_at_each_turn_with_how_long_the_save_has_taken() -> None:
    world = World()
    world.turn(Phase.TRAINING, first=True)
    world.turn(Phase.SAVING, now=2.0)
    assert world.turn(Phase.SAVING, now=5.0) == ""
    assert world.saving[0] is None and world.saving[2] == pytest.approx(3.1)
    world.kind = DRAIN
    assert world.turn(Phase.SAVING, now=6.0) == "because"
    assert world.done == [Ask, "hurry", "hold", Kill]


def test_nothing_is_chosen_once_the_disk_has_the_snapshot() -> None:
    world = World()
    world.kind, world.left_in_memory = DRAIN, None
    assert world.turn(Phase.EVALUATING) == "" and world.saving == []
