"""What the supervisor says of its run: the record, the states in the journal, lines for people."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity, job_records, read_record
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.run_state import Event, RunState, advance
from elastic_ckpt.supervisor.settings import RunSettings

log = logging.getLogger(__name__)


def first_record(
    settings: RunSettings, job: JobDirectory, run_id: str, board: str, *, leads: bool
) -> NodeRecord:
    """What there is to say as a run begins; incarnations are counted on through all runs."""
    previous = read_record(job.node_record(settings.node))
    return NodeRecord(
        job=settings.name,
        run_id=run_id,
        node=settings.node,
        owner=ProcessIdentity.current(),
        since=time.time(),
        state=RunState.STARTING,
        incarnation=max((record.incarnation for record in job_records(job)), default=0),
        board=board,
        message="starting",
        preemptions=previous.preemptions if previous else 0,
        last_recovery=previous.last_recovery if previous else None,
        grace=settings.grace,
        head=settings.node if leads else "?",
    )


class Account:
    """Holds the run's state and says so, each time that something of it changes.

    Args:
        path: of the node's record.
        record: as the run begins.
        listener: shows one line to whoever started the run.

    Attributes:
        record: as it was told last.
    """

    def __init__(
        self, path: Path, record: NodeRecord, journal: Journal, listener: Callable[[str], None]
    ) -> None:
        self.record = record
        self._path = path
        self._journal = journal
        self._listener = listener

    @property
    def state(self) -> RunState:
        """Of the run."""
        return self.record.state

    def say(self, line: str) -> None:
        """Show a line."""
        log.info("%s", line)
        # Whoever started the run may be gone: a terminal that hung up, the end of a pipe.
        with contextlib.suppress(OSError):
            self._listener(line)

    def move(self, event: Event, message: str = "", *, step: int = -1, **changes: Any) -> None:
        """Something happened: go where ``TRANSITIONS`` says, and tell.

        Args:
            message: what it is doing now, or why it ended; empty to leave what was said.
            step: that training goes on from, for the journal; -1 where it does not.
            changes: of the record, besides.
        """
        before = self.state
        self.record.state = advance(before, event)
        if message:
            self.record.message = message
            self.say(message)
        if self.state is not before:
            log.info("%s -> %s", before.value, self.state.value)
            told = {"step": step} if step >= 0 else {}
            self._journal.note("state", state=self.state.value, message=self.record.message, **told)
        self.update(**changes)

    def update(self, **changes: Any) -> None:
        """Change fields of the record, and write it."""
        for name, value in changes.items():
            setattr(self.record, name, value)
        # The record is for people; a full disk must not keep the job from being saved.
        with contextlib.suppress(OSError):
            self.record.write(self._path)
