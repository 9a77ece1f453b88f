"""Who leads a multi-node job after its head is lost: pure.

A node that has lost its head watches the newest run record. It follows a newer head, or becomes
the next one itself: the first of the roster that is still there. Nothing here decides who may
seal: the run number does, which only one node can create.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from elastic_ckpt.protocol.cluster import JobState

STAGGER_SECONDS: Final = 1.0
"""How much later each further node of the roster tries, so that usually only one does."""

MAX_POSITION: Final = 16
"""Further nodes of the roster try at the same time."""

NO_POSITION: Final = -1
"""Of a node that never was in the job: it follows, and does not lead."""


@dataclass(frozen=True)
class RosterPlace:
    """A node's place in the order of succession.

    Attributes:
        position: 0 for the head, 1 for the first node after it.
        others: nodes that are expected besides the lost head and this one.
    """

    position: int
    others: int = 0


NO_PLACE: Final = RosterPlace(NO_POSITION)


@dataclass(frozen=True)
class Leader:
    """The newest run of a job, as its record and its beat show it.

    Attributes:
        number: its run number.
        endpoint: where its nodes meet; empty for a run of one node.
        beat: changes while it lives.
        ended: it has ended, and seals nothing any more.
        passed_on: it has ended and left the job to its other nodes.
    """

    number: int
    node: str = ""
    endpoint: str = ""
    beat: bytes = b""
    ended: bool = False
    passed_on: bool = False


@dataclass(frozen=True)
class Follow:
    """Go to the head at this endpoint."""

    leader: Leader


@dataclass(frozen=True)
class Lead:
    """Take the run number after that of ``leader``."""

    leader: Leader


@dataclass(frozen=True)
class Leave:
    """End this node's run: the job has ended with that of ``leader``, for which it was looking."""

    leader: Leader


def position(job: JobState, number: int) -> int:
    """Return a member's place in the order of succession: 0 for the head, 1 for the first after it.

    Members outside the roster come after it, in the order in which they joined.
    """
    if number in job.roster:
        return job.roster.index(number)
    return len(job.roster) + sum(one not in job.roster for one in range(number))


class Succession:
    """The view of one node that looks for a head. Times are monotonic seconds of this node, so no
    clocks are compared."""

    def __init__(self, endpoint: str, position: int, lease: float) -> None:
        """
        Args:
            endpoint: where this node looks for the head now.
            position: this node's place in the order of succession, or ``NO_POSITION``.
            lease: seconds without a beat after which the head has lost the job.
        """
        self._endpoint = endpoint
        self._position = position
        self._lease = lease
        self._first: Leader | None = None  # as this node saw it first
        self._last: Leader | None = None
        self._since = 0.0  # when ``_last`` was seen first
        self._heard = 0.0

    def judge(self, leader: Leader | None, now: float) -> Follow | Lead | Leave | None:
        """Return what to do; None to keep looking.

        Args:
            leader: the newest run; None if the storage has not answered.
        """
        if leader is None:
            return None
        # After a pause of this node or its storage, the head may not have beaten for it either.
        if leader != self._last or now - self._heard > self._lease / 2:
            self._first, self._last, self._since = self._first or leader, leader, now
        self._heard = now
        if not leader.ended and leader.endpoint not in ("", self._endpoint):
            # A record may be of a run that was killed long ago: it has to show that it lives.
            return Follow(leader) if leader != self._first else None
        if leader.ended and not leader.passed_on:  # the job is over, unless it is run again
            first = self._first
            has_lived = first is not None and first.number == leader.number and not first.ended
            return Leave(leader) if has_lived else None
        if self._position == NO_POSITION:
            return None
        wait = 0.0 if leader.passed_on else self._lease
        wait += STAGGER_SECONDS * max(0, min(self._position, MAX_POSITION) - 1)
        return Lead(leader) if now - self._since >= wait else None
