"""The parts of a job's history. Times are seconds since the epoch, durations seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


@dataclass
class Run:
    """A run of a supervisor, or of a script without one; filled in as it proceeds.

    Attributes:
        supervised: False for a script without a supervisor.
        ended: None while it runs.
        exit_code: None while it runs, and if it is unknown.
        killed: it ended without an entry.
        began: when it started.
        node: that it was started on, or that led it.
        script, version, versions, revision: as in the event ``start``.
    """

    supervised: bool = True
    began: float = 0.0
    node: str = ""
    script: str = ""
    version: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    revision: str = ""
    ended: float | None = None
    exit_code: int | None = None
    killed: bool = False


@dataclass
class Incarnation:
    """One launch of all workers; filled in as it proceeds.

    Attributes:
        run: index of its run.
        nproc, nodes: workers of each node, and nodes; 0 if unknown.
        first_step_at: None if it never started a step.
        ended: None while it runs.
        kind: how it ended, one of ``EndKind``; ``killed`` if unknown; empty while it runs.
        from_epoch, from_step, tier: the checkpoint it resumed from; None and empty without one.
        since: when that checkpoint's state was taken; None if its save is not in the journal.
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
    message: str = ""
    from_epoch: int | None = None
    from_step: int | None = None
    tier: str = ""
    since: float | None = None
    reached_epoch: int | None = None
    reached_step: int | None = None

    @property
    def ranks(self) -> int:
        """The number of workers; 0 if unknown."""
        return self.nproc * self.nodes


@dataclass
class PastSave:
    """A save that is over; filled in with what followed.

    Attributes:
        error: why it failed; empty if it did not.
        predicted_seconds: of an emergency save; None if unknown.
        drain_error: why the newest drain after it failed; empty if it did not.
    """

    at: float
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
    WARNING = "warning"  # it may go away
    HELD = "held"  # it goes away, and nothing is started before that


@dataclass
class PastNotice:
    """A notice that a node goes away; filled in with what followed.

    Attributes:
        run: index of the run that received it; None outside of runs.
        follows: another node leads the job, which continues without this one.
        grace: seconds until the node goes away; None for a warning.
        why: the reason for what was saved.
        predicted_seconds, actual_seconds: of the save on the notice; None if unknown.
        saved_step: the step that was saved on the notice.
        node: that goes away.
    """

    at: float
    run: int | None
    kind: NoticeKind
    source: str
    reason: str
    follows: bool = False
    grace: float | None = None
    why: str = ""
    predicted_seconds: float | None = None
    actual_seconds: float | None = None
    saved_step: int | None = None
    node: str = ""


class Cause(Enum):
    """What interrupted a job."""

    FAILURE = "failure"  # a worker, the agent or a node failed
    KILLED = "killed"  # a whole run ended without an entry
    GAVE_UP = "gave up"  # a run ended by itself, but not finished
    PREEMPTION = "preemption"  # a run ended because of a notice
    REGROUPING = "regrouping"  # all ranks left, to restart with other nodes or settings

    @property
    def is_failure(self) -> bool:
        """Whether it was a failure and not planned."""
        return self in (Cause.FAILURE, Cause.KILLED, Cause.GAVE_UP)


@dataclass(frozen=True)
class Interruption:
    """A stop of the training before the job was done.

    Attributes:
        at: when its ranks were gone.
        run: index of the run.
        incarnation: number of the incarnation; 0 if none ran.
        kind: a failure's class, one of ``FailureClass``; a preemption's first source.
        rank: the first to fail; -1 if it was not a rank.
        tail: the last lines that the rank printed.
        stacks: where each rank was, for a hang.
        node: where it began; empty if unknown.
    """

    cause: Cause
    at: float
    run: int
    incarnation: int
    kind: str = ""
    rank: int = -1
    message: str = ""
    tail: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    node: str = ""


@dataclass(frozen=True)
class Recovery:
    """From a failure to the end of the next first step: seconds by stage, in order."""

    at: float
    total: float
    stages: Mapping[str, float]
    step: int | None
    tier: str


@dataclass(frozen=True)
class Refused:
    """A checkpoint that was set aside, or not loaded from memory; then ``to`` is empty."""

    at: float
    path: str
    to: str
    reason: str


@dataclass(frozen=True)
class Incident:
    """Another event that the report lists, in one line."""

    at: float
    what: str
    text: str


@dataclass(frozen=True)
class Sample:
    """The training's position at a moment, and its metrics.

    Attributes:
        incarnation: index of the incarnation; None without one.
        samples_per_step: of all ranks; 0 if unknown.
    """

    at: float
    incarnation: int | None
    epoch: int
    step: int
    samples_per_step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
