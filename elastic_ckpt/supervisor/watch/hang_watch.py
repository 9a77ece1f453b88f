"""Detects a hang, and finds out which rank is to blame before any worker is killed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from elastic_ckpt.journal.events import HangFound
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.hang import Effort, Hang, HangDetector, Silence, StalledNode
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome, Slot
from elastic_ckpt.supervisor.ports import Clock, HostPort
from elastic_ckpt.supervisor.watch.process_watch import AWAY_SECONDS

EFFORT_POLL_SECONDS: Final = 15.0
"""How often to look at what silent workers do."""


class HangWatch:
    """Watches one node's ranks for a hang; the supervisor's loop calls :meth:`poll` at each turn.
    ``idle``: all have been silent for longer than ``detector`` has ever seen."""

    def __init__(
        self, board: Board, journal: Journal, min_seconds: float, host: HostPort, clock: Clock
    ) -> None:
        """No silence shorter than ``min_seconds`` is a hang."""
        self._board = board
        self._journal = journal
        self._host = host
        self._clock = clock
        # When it polled last, and when it came back last after it had been stopped.
        self._polled = self._back = clock.monotonic_ns()
        self.detector = HangDetector(min_seconds)
        self._before: dict[int, tuple[int, Silence]] = {}  # by local rank, with its beat
        self._explaining = False
        self._found: StalledNode | None = None
        self.idle = False
        self._effort: Effort | None = None  # in this silence, which is a hang if they are idle
        self._effort_due = 0  # nanoseconds; 0 outside of such a silence
        self._silences = 0  # a late thread must not report on a later one
        self._incarnations = 0  # a late thread must not report on a later one

    def begin(self) -> None:
        """Start watching another incarnation."""
        self._before.clear()
        self._polled = self._clock.monotonic_ns()
        self._incarnations += 1
        self._explaining, self._found, self.idle = False, None, False
        self._end_silence()

    def excuse(self) -> None:
        """Count no silence until now: the job was suspended, or a debugger held it."""
        self._back = self._clock.monotonic_ns()

    def poll(self, *, alone: bool = True) -> StalledNode | None:
        """Return a hang once its stacks have been read, else None. Does not wait. Unless ``alone``,
        ranks of other nodes have to be idle as well."""
        now = self._clock.monotonic_ns()
        if now - self._polled > AWAY_SECONDS * 1e9:
            self._back = now
        self._polled = now
        if self._explaining:
            found, self._found = self._found, None
            return found
        slots = [slot for slot in self._board.read_slots() if slot.outcome is Outcome.NONE]
        silences = [_silence(slot, now, self._back) for slot in slots]
        for slot, silence in zip(slots, silences, strict=True):
            beat, before = self._before.get(slot.local_rank, (slot.beat, silence))
            if beat != slot.beat:
                # Too long by a poll at most; what the last poll saw may be half of it.
                idle = max((slot.beat - max(beat, self._back)) / 1e9, before.idle_seconds)
                self.detector.learn(replace(before, idle_seconds=idle))
            self._before[slot.local_rank] = slot.beat, silence
        self.idle = self._is_idle(slots, silences, now)
        if self.idle and alone:
            self._explaining = True
            incarnation = self._incarnations
            self._host.aside(lambda: self._explain(slots, silences, incarnation))
        return None

    def _is_idle(self, slots: Sequence[Slot], silences: Sequence[Silence], now: int) -> bool:
        """Return whether it is a hang, given what the workers do; looks at that from a thread."""
        if not self.detector.hangs(silences):
            self._end_silence()
            return False
        if now >= self._effort_due:
            self._effort_due = now + int(EFFORT_POLL_SECONDS * 1e9)
            pids, number = [slot.pid for slot in slots], self._silences
            self._host.aside(lambda: self._measure(pids, number))
        return self._effort is not None and self.detector.hangs(silences, self._effort)

    def _measure(self, pids: Sequence[int], number: int) -> None:
        effort = self._host.effort(pids)
        if number == self._silences:
            self._effort = effort

    def _end_silence(self) -> None:
        if self._effort_due:
            self._silences += 1
        self._effort, self._effort_due = None, 0

    def _explain(
        self, slots: Sequence[Slot], silences: Sequence[Silence], incarnation: int
    ) -> None:
        stacks = self._host.stacks({slot.rank: slot.pid for slot in slots})
        stuck = StalledNode(
            tuple(silences),
            tuple(number for number, stack in stacks.items() if stack.waits),
            {number: stack.own for number, stack in stacks.items() if stack.own},
            unread=next((stack.why for stack in stacks.values() if stack.why), ""),
        )
        self._journal.write(
            HangFound(
                rank=Hang.of([stuck]).rank,
                step=max(silence.entered for silence in silences),
                idle_seconds=min(silence.idle_seconds for silence in silences),
                phases={str(silence.rank): silence.phase for silence in silences},
                stacks={str(number): stack.lines for number, stack in stacks.items()},
            )
        )
        if incarnation == self._incarnations:
            self._found = stuck


def _silence(slot: Slot, now: int, back: int) -> Silence:
    return Silence(
        rank=slot.rank,
        phase=slot.phase.name.lower(),
        entered=slot.entered,
        idle_seconds=(now - max(slot.beat, back)) / 1e9 if slot.beat else 0.0,
        # Where an evaluation cannot be told from a step, nothing is learned of either.
        has_stepped=slot.declares and slot.finished > slot.start_step,
    )
