"""The input of a report: state, journal and checkpoints of a job at one moment."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

from elastic_ckpt.checkpoint.catalog import (
    CheckpointView,
    in_memory,
    own_views,
    quarantined,
    scan,
    view,
)
from elastic_ckpt.checkpoint.own.seal import seals
from elastic_ckpt.cli.status.view import StatusView, gather
from elastic_ckpt.jobdir.node_record import NodeRecord, job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.cost import Cost, costs
from elastic_ckpt.journal.curve import Steps
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.history_types import Cause, Interruption
from elastic_ckpt.journal.journal import read_journal
from elastic_ckpt.journal.time_account import Goodput, Span, total

MAX_CHECKPOINTS = 100
"""The newest ones are checked; a job that keeps all may have thousands."""

_AT_REST = ("finished", "preempted", "failed", "dead", "unknown")


@dataclass(frozen=True)
class Material:
    """The state and history of a job.

    Attributes:
        at: when it was gathered, seconds since the epoch.
        checkpoints: newest first, including those in memory.
        older: number of older ones that were not checked.
        set_aside: the checkpoints in quarantine.
        records: of all nodes, the latest run's head first.
    """

    directory: str
    at: float
    status: StatusView
    history: History
    checkpoints: list[CheckpointView]
    older: int
    set_aside: list[CheckpointView]
    records: list[NodeRecord]

    @property
    def now(self) -> float | None:
        """The end of the account of time; None for a stopped job: its last event."""
        return None if self.status.state in _AT_REST else self.at

    @cached_property
    def spans(self) -> list[Span]:
        """Where the time went, without gaps."""
        return self.history.account.spans(self.now)

    @cached_property
    def goodput(self) -> Goodput:
        """The seconds of each category."""
        return total(self.spans)

    @cached_property
    def steps(self) -> Steps:
        """The steps of all incarnations."""
        return Steps(self.history.samples, self.history.incarnations)

    @cached_property
    def costs(self) -> list[Cost]:
        """The cost of each interruption, in the history's order."""
        history = self.history
        return costs(
            history.interruptions,
            history.incarnations,
            self.spans,
            restarts_count=self.steps.restarts_count,
        )

    @cached_property
    def failures(self) -> list[tuple[str, Interruption, Cost]]:
        """Label, failure and cost, in order of time."""
        pairs = zip(self.history.interruptions, self.costs, strict=True)
        found = [pair for pair in pairs if pair[0].cause.is_failure]
        return [(f"F{number}", one, cost) for number, (one, cost) in enumerate(found, 1)]

    @cached_property
    def preemptions(self) -> list[tuple[Interruption, Cost]]:
        """Interruption and cost, in order of time."""
        pairs = zip(self.history.interruptions, self.costs, strict=True)
        return [pair for pair in pairs if pair[0].cause is Cause.PREEMPTION]

    @property
    def began(self) -> float:
        """When the first event was; now without one."""
        return self.at if self.history.first is None else self.history.first

    @property
    def ended(self) -> float:
        """The end of what is reported: the last event, or now."""
        last = self.began if self.history.last is None else self.history.last
        return last if self.now is None else max(self.now, last)


def collect(job: JobDirectory) -> Material:
    """Gather everything; works with the supervisor alive, dead or never started."""
    history = History.of(read_journal(job))
    status = gather(job, history)
    at = time.time()
    running = status.state not in _AT_REST
    records = job_records(job)
    record = records[0] if records else None
    kept, older = _checkpoints(job, record.memory if record else "")
    history.close(running=running)
    return Material(str(job.root), at, status, history, kept, older, quarantined(job), records)


def _checkpoints(job: JobDirectory, memory: str) -> tuple[list[CheckpointView], int]:
    paths = [path for one in reversed(job.sessions()) for path in scan(one)]
    views = [view(path) for path in paths[:MAX_CHECKPOINTS]] + in_memory(job, memory)
    views += own_views(job, MAX_CHECKPOINTS)
    views.sort(key=lambda one: one.age, reverse=True)
    return views, sum(max(0, len(found) - MAX_CHECKPOINTS) for found in (paths, seals(job)))
