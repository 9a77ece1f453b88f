"""Whether a new run may take a job over from its previous owner: pure.

An owner beats. Whoever wants the job watches the beat change by its own clock, so no two clocks are
compared: a lease in the sense of Gray and Cheriton (1989), without the time that the owner would
have to agree on.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

BEAT_SECONDS: Final = 5.0
"""How often an owner beats, and checks that it is still the owner."""

LEASE_SECONDS: Final = 20.0
"""An owner on another host that has not beaten for this long has lost the job."""


NODE_LEASE_SECONDS: Final = 30.0
"""The same for the name of a node, whose supervisor's heartbeat comes every 10 s."""


BUCKET_BEAT_SECONDS: Final = 10.0
BUCKET_LEASE_SECONDS: Final = 40.0
"""The same for the owner of a bucket, where each beat costs two requests."""


HEAD_BEAT_SECONDS: Final = 2.0
BUCKET_HEAD_BEAT_SECONDS: Final = 5.0
"""The same for the head of several nodes, whose place another one takes if it is lost."""


SURVIVOR_LEASE_SECONDS: Final = 8.0
BUCKET_SURVIVOR_LEASE_SECONDS: Final = 20.0
"""A head that its members have lost, and that has not beaten for this long, has lost the job.

Shorter than for a new run, since two signs agree. A mistake costs a restart, never a checkpoint:
whoever has the newest run number seals."""


class Verdict(Enum):
    """What a run that wants the job does next."""

    WAIT = auto()
    TAKE = auto()
    REFUSE = auto()


class LeaseWatch:
    """Watches the beat of the previous owner.

    Args:
        gone: it is certain that the owner is gone; nothing is waited for.
        now: monotonic seconds on this host.
        lease: seconds without a beat after which the owner has lost it.
    """

    def __init__(
        self, beat: bytes, now: float, *, gone: bool, lease: float = LEASE_SECONDS
    ) -> None:
        self._first = beat
        self._since = now
        self._gone = gone
        self._lease = lease

    def judge(self, beat: bytes, now: float) -> Verdict:
        """Return what to do, given the owner's newest beat."""
        if beat != self._first:
            return Verdict.REFUSE
        if self._gone or now - self._since >= self._lease:
            return Verdict.TAKE
        return Verdict.WAIT
