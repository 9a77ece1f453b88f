"""What is done under a notice for the work that the disk lacks: a save of all ranks, or a drain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from elastic_ckpt.policy.emergency import ChoiceKind
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.messages import Ask, Kill
from elastic_ckpt.protocol.slot import Outcome, Phase, Slot
from elastic_ckpt.supervisor.ports import AgentPort, MemoryPort
from elastic_ckpt.supervisor.saves.adviser import SaveAdviser

TURN_SECONDS: Final = 0.1
"""Between two turns while a snapshot is in memory only: a save has to find the disk free."""


class EmergencySave:
    """Chooses at the notice, and again at each turn as time passes. Times are monotonic seconds.

    The disk belongs to the ranks while they write, and to the drain of the newest snapshot
    otherwise: a rank in a long step or an evaluation may never come to its save.
    """

    def __init__(self, memory: MemoryPort, saves: SaveAdviser) -> None:
        self._memory = memory
        self._saves = saves
        self._writing_since: float | None = None
        self._holds: bool | None = None

    @property
    def is_open(self) -> bool:
        """Whether a snapshot is in memory only, so that there is something to choose."""
        return self._memory.not_on_disk() is not None

    def begin(self, agent: AgentPort, left: float, slots: Sequence[Slot], now: float) -> str:
        """Ask the ranks to save and leave; returns as :meth:`choose`.

        Even where nothing seems to fit: a save that is cut off costs nothing more.
        """
        why = self._kill_for_drain(agent, left, slots, now)
        if not why:
            agent.send(Ask(RequestKind.STOP, leaving=True))
            self._share_disk(slots, now)
        return why

    def choose(self, agent: AgentPort, left: float, slots: Sequence[Slot], now: float) -> str:
        """Decide again, at each turn until the ranks have left.

        Returns:
            Why the newest snapshot is drained instead, the ranks being killed; else empty.
        """
        self._share_disk(slots, now)
        return self._kill_for_drain(agent, left, slots, now) if self.is_open else ""

    def _share_disk(self, slots: Sequence[Slot], now: float) -> None:
        writes = _write(slots)
        self._writing_since = (self._writing_since or now) if writes else None
        if writes is not self._holds:
            self._holds = writes
            if writes:
                self._memory.hold()
            else:
                self._memory.hurry()

    def _kill_for_drain(
        self, agent: AgentPort, left: float, slots: Sequence[Slot], now: float
    ) -> str:
        since = self._writing_since
        saving = None if since is None else now - since + TURN_SECONDS  # it may have begun earlier
        choice = self._saves.noticed(left, slots, now, self._memory.undrained_bytes(), saving)
        if choice.kind is not ChoiceKind.DRAIN_NEWEST:
            return ""
        agent.send(Kill())
        return choice.why


def _write(slots: Sequence[Slot]) -> bool:
    """Return whether the ranks really save: one that waits for another's step writes nothing."""
    here = [slot for slot in slots if slot.attached and slot.outcome is Outcome.NONE]
    phases = {slot.phase for slot in here}
    return Phase.SAVING in phases and phases <= {Phase.SAVING, Phase.LEAVING}
