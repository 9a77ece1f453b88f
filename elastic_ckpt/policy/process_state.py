"""What to do about an agent or a worker that does not run: continue it, the next time kill it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

STUCK_SECONDS: Final = 5.0
"""How long a process may be stopped, or a zombie. One that is suspended along with others is
stopped a moment before them, and continues a moment later."""

URGENT_SECONDS: Final = 1.0
"""The same under a notice, when all ranks have to save."""

AGAIN_SECONDS: Final = 60.0
"""A process that is stopped again this soon after it was continued is killed: it would not stay."""

STOPPED: Final = "T"
TRACED: Final = "t"
"""Stopped by a debugger, which somebody is looking at."""

_DEAD: Final = frozenset("ZX")


class Remedy(Enum):
    """What to do about a process."""

    CONTINUE = "continue"  # no work is lost
    KILL = "kill"


@dataclass
class ProcessStates:
    """How long the processes of one incarnation have been stuck.

    Attributes:
        suspended: all of them are stopped, or a debugger holds one: their silence does not count.
    """

    suspended: bool = False
    _since: dict[int, float] = field(default_factory=dict)
    _continued: dict[int, float] = field(default_factory=dict)
    _killed: set[int] = field(default_factory=set)

    def forget(self) -> None:
        """Start the times again: nothing was looked at meanwhile."""
        self._since.clear()

    def judge(
        self, states: Mapping[int, str], now: float, *, urgent: bool = False
    ) -> dict[int, Remedy]:
        """Return what is due now, by pid.

        Args:
            states: the letter in /proc by pid; empty for a process that is gone, which others
                notice.
            now: monotonic seconds.
            urgent: the job has to be saved. A suspended one is continued as well, and nothing that
                is stopped is killed: what was not saved would be lost.
        """
        found = set(states.values())
        self.suspended = not urgent and (found == {STOPPED} or TRACED in found)
        stuck = {pid for pid, state in states.items() if state == STOPPED or state in _DEAD}
        if self.suspended:
            stuck = set()
        self._since = {pid: self._since.get(pid, now) for pid in stuck}
        limit = URGENT_SECONDS if urgent else STUCK_SECONDS
        due = [pid for pid, since in self._since.items() if now - since >= limit]
        return {
            pid: self._remedy(pid, states[pid], now, urgent=urgent)
            for pid in due
            if pid not in self._killed
        }

    def _remedy(self, pid: int, state: str, now: float, *, urgent: bool) -> Remedy:
        soon = now - self._continued.get(pid, -AGAIN_SECONDS) < AGAIN_SECONDS
        if state != STOPPED or (soon and not urgent):
            self._killed.add(pid)
            return Remedy.KILL
        self._continued[pid] = now
        del self._since[pid]
        return Remedy.CONTINUE
