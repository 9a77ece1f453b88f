"""What the supervisor reports about its run: the record, its states in the journal, lines."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from elastic_ckpt import __version__
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity, job_records, read_record
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.journal.events import RunStarted, StateChanged
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.run_state import Event, RunState, advance
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.util.journald import Line, Priority

log = logging.getLogger(__name__)

_PRIORITIES: Final[Mapping[RunState, Priority]] = {
    RunState.BACKING_OFF: Priority.WARNING,
    RunState.DRAINING: Priority.NOTICE,
    RunState.PREEMPTED: Priority.NOTICE,
    RunState.FAILED: Priority.ERROR,
}
"""The priority of what a state begins with, in systemd's journal; others have ``INFO``."""


def first_record(
    settings: RunSettings, job: JobDirectory, run_id: str, board: str, run_number: int
) -> NodeRecord:
    """Return the record of a run that starts; incarnations are counted through all runs. The run
    number is 0 for a node that follows."""
    previous = read_record(job.node_record(settings.node))
    return NodeRecord(
        job=settings.name,
        run_id=run_id,
        node=settings.node,
        owner=ProcessIdentity.current(),
        since=time.time(),
        state=RunState.STARTING,
        run_number=run_number,
        incarnation=max((record.incarnation for record in job_records(job)), default=0),
        board=board,
        message="starting",
        preemptions=previous.preemptions if previous else 0,
        last_recovery=previous.last_recovery if previous else None,
        grace=settings.grace,
        saves_itself=bool(settings.own),
        head=settings.node if run_number else "?",
        trained=_trained(previous),
        bucket=settings.own_bucket,
    )


def _trained(previous: NodeRecord | None) -> RunCommand | None:
    """Return the command of the last run that may have trained, without its environment."""
    if previous is None or previous.exit_code in (ExitCode.USAGE, ExitCode.DATA):
        return previous.trained if previous is not None else None
    command = previous.command
    bare = {"environment": (), "versions": {}, "revision": ""}
    return msgspec.structs.replace(command, **bare) if command is not None else None


def started(record: NodeRecord, settings: RunSettings) -> RunStarted:
    """Return the journal's first event of a run."""
    command = record.command
    return RunStarted(
        run_id=record.run_id,
        script=str(settings.script),
        nproc=settings.nproc,
        version=__version__,
        versions=command.versions if command else {},
        revision=command.revision if command else "",
        slurm_restarts=os.environ.get("SLURM_RESTART_COUNT"),
    )


class RunRecord:
    """The run's state, published each time that something of it changes; ``node`` is the record."""

    def __init__(
        self,
        first: NodeRecord,
        journal: Journal,
        publish: Callable[[NodeRecord], None],
        show: Callable[[str], None],
    ) -> None:
        """``publish`` writes the record soon, ``show`` shows one line to the user."""
        self.node = first
        self._journal = journal
        self._publish = publish
        self._show = show

    @property
    def state(self) -> RunState:
        """The state of the run."""
        return self.node.state

    def say(self, line: str) -> None:
        """Show a line to the user."""
        log.info("%s", line)
        # The user may be gone: a terminal that hung up, the end of a pipe.
        with contextlib.suppress(OSError):
            self._show(line)

    def move(self, event: Event, message: str = "", *, step: int = -1, **changes: Any) -> None:
        """Take the transition for ``event`` and publish it.

        Args:
            message: what the run is doing now, or why it ended; empty leaves it as it is.
            step: the step that training resumes from, for the journal; -1 where it does not.
            changes: other fields of the record.
        """
        before = self.state
        self.node.state = advance(before, event)
        if message:
            self.node.message = message
            self.say(Line(message, _PRIORITIES.get(self.state, Priority.INFO)))
        if self.state is not before:
            log.info("%s -> %s", before.value, self.state.value)
            resumed, message = step if step >= 0 else None, self.node.message
            self._journal.note(StateChanged(state=self.state.value, message=message, step=resumed))
        self.update(**changes)

    def update(self, **changes: Any) -> None:
        """Change fields of the record, and publish it."""
        for name, value in changes.items():
            setattr(self.node, name, value)
        self._publish(msgspec.structs.replace(self.node))
