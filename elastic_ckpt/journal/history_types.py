"""What a job's history consists of. Times are seconds since the epoch, durations seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


@dataclass
class Run:
    """One supervisor's life, or that of a script without one; filled in as it goes on.

    Attributes:
        run_id, script: as its ``start`` says.
        supervised: False for a script that ran without a supervisor.
        ended: None while it runs.
        exit_code: None while it runs, and where nobody said.
        killed: it ended without a word.
    """

    began: float
    run_id: str = ""
    script: str = ""
    supervised: bool = True
    ended: float | None = None
    state: str = ""
    exit_code: int | None = None
    message: str = ""
    killed: bool = False


@dataclass
class Incarnation:
    """One launch of all workers; filled in as it goes on.

    Attributes:
        run: index of the run that it is of.
        nproc, nodes: workers of each node, and nodes; 0 where nobody said.
        first_step_at: None if it never came to a step.
        ended: None while it runs.
        kind: how it ended, as in ``protocol/ended.py``; ``killed`` if nobody could say; empty while
            it runs.
        from_epoch, from_step, tier: what it went on from; None and empty if nothing.
        since: of which moment that was the state; None if its save is not in the journal.
        reached_epoch, reached_step: the last step that it is known to have finished.
    """

    number: int
    run: int
    launched: float
    nproc: int = 0
    nodes: int = 0
    first_step_at: float | None = None
    ended: float | None = None
    kind: str = ""
    rank: int = -1
    message: str = ""
    from_epoch: int | None = None
    from_step: int | None = None
    tier: str = ""
    since: float | None = None
    reached_epoch: int | None = None
    reached_step: int | None = None

    @property
    def ranks(self) -> int:
        """All workers; 0 where nobody said."""
        return self.nproc * self.nodes


@dataclass
class Save:
    """A save that is over; filled in with what followed.

    Attributes:
        error: why it failed; empty if it did not.
        predicted_seconds: of an emergency save; None if unknown.
        drain_error: why the newest drain after it failed; empty if it did not.
    """

    at: float
    epoch: int | None
    step: int | None
    reason: str
    tier: str
    bytes: int | None
    seconds: float
    stall_seconds: float
    error: str = ""
    predicted_seconds: float | None = None
    drain_error: str = ""


class NoticeKind(Enum):
    """The values are the journal's."""

    NOTICE = "notice"  # the node goes away
    WARNING = "warning"  # it may
    HELD = "held"  # it goes away, and nothing is started before


@dataclass
class Notice:
    """Word that a node goes away; filled in with what followed.

    Attributes:
        run: index of the run that heard it; None outside of runs.
        node: that goes away.
        follows: another node leads the job, and the job goes on without this one.
        grace: seconds that it left; None for a warning.
        choice, why: what was decided to save, and the reason.
        predicted_seconds, actual_seconds: of the save on it; None where nobody knew, or none was.
        saved_step: what was saved on it.
    """

    at: float
    run: int | None
    kind: NoticeKind
    source: str
    reason: str
    node: str = ""
    follows: bool = False
    grace: float | None = None
    choice: str = ""
    why: str = ""
    predicted_seconds: float | None = None
    actual_seconds: float | None = None
    saved_step: int | None = None


class Cause(Enum):
    """What a job was interrupted by."""

    FAILURE = "failure"  # a worker, the agent or a node failed
    KILLED = "killed"  # a whole run ended without a word
    GAVE_UP = "gave up"  # a run ended by itself, and not well
    PREEMPTION = "preemption"  # it left on a notice
    REGROUPING = "regrouping"  # all ranks left, to begin again with other nodes or settings

    @property
    def is_failure(self) -> bool:
        """Whether something went wrong that nobody had announced."""
        return self in (Cause.FAILURE, Cause.KILLED, Cause.GAVE_UP)


@dataclass(frozen=True)
class Interruption:
    """The job stopped training before it was done.

    Attributes:
        at: when its ranks were gone.
        run: index of the run.
        incarnation: number of the incarnation; 0 if none ran.
        kind: a failure's class, as in ``policy/failure.py``; a preemption's first source.
        rank: who failed first; -1 if it was no rank.
        tail: the last lines that the rank printed.
        stacks: of a hang, where each rank was.
    """

    cause: Cause
    at: float
    run: int
    incarnation: int
    kind: str = ""
    rank: int = -1
    exit_code: int | None = None
    message: str = ""
    tail: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recovery:
    """From a failure to the end of the next first step: seconds by stage, in order."""

    at: float
    incarnation: int
    total: float
    stages: Mapping[str, float]
    step: int | None
    tier: str


@dataclass(frozen=True)
class Check:
    """A verification, and its outcome; ``why`` is empty for an intact checkpoint."""

    at: float
    path: str
    intact: bool
    why: str
    how: str
    seconds: float


@dataclass(frozen=True)
class Refused:
    """A checkpoint that was set aside, or not taken from memory; ``to`` is empty for the latter."""

    at: float
    path: str
    to: str
    reason: str


@dataclass(frozen=True)
class Incident:
    """Anything else that is worth a line."""

    at: float
    what: str
    text: str


@dataclass(frozen=True)
class Sample:
    """Where the training was at a moment, and what it reported.

    Attributes:
        incarnation: index of the incarnation; None if nobody launched one.
        samples_per_step: of all ranks together; 0 if unknown.
    """

    at: float
    incarnation: int | None
    epoch: int
    step: int
    samples_per_step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
