"""How long a job has trained and how often it failed, over all of its runs.

A failure throws work away: a crash, a node that vanished without notice, or a notice on which
nothing was saved. A preemption with a save within its grace loses nothing and does not count.
"""

from __future__ import annotations

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.journal.events import (
    Crashed,
    IncarnationEnded,
    NoticeReceived,
    RunEnded,
    RunStarted,
    Saved,
    StateChanged,
)
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.protocol.ended import EndKind
from elastic_ckpt.protocol.run_state import RunState

_REGROUPED = (EndKind.STOPPED.value, EndKind.NOT_BEGUN.value)
"""All ranks left for an incarnation of other nodes, a checkpoint sealed."""


class FailureHistory:
    """Folds a job's journal, entry by entry, in order of time.

    Attributes:
        failures: how often work was lost.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._trained = 0.0
        self._since: float | None = None  # the first step of the running incarnation
        self._last: float | None = None
        self._noticed = False
        self._saved = False  # since the notice
        self._at_stake = False  # after a notice the run's end shows whether work was lost

    def trained_seconds(self, now: float) -> float:
        """Return how long the job has trained until ``now``, in seconds on the wall clock."""
        running = 0.0 if self._since is None else max(0.0, now - self._since)
        return self._trained + running

    def observe(self, entry: JournalEntry) -> None:
        """Take the next entry into account, unless a node wrote it that does not lead."""
        wall, event = entry.wall, entry.event
        if event.follows:
            return
        before = wall if self._last is None else self._last
        self._last = wall
        match event:
            case StateChanged(state=RunState.RUNNING.value):
                self._since = wall
            case NoticeReceived():
                self._noticed = True
            case Saved():
                self._saved = self._noticed
            case IncarnationEnded(kind=EndKind.COMPLETED.value):
                self._stop(wall, failed=False)
            case IncarnationEnded() if event.kind in _REGROUPED and not self._noticed:
                self._stop(wall, failed=False)
            case IncarnationEnded() | Crashed():
                self._stop(wall, failed=True)
            case RunEnded():
                self._stop(wall, failed=True)
                self._settle(saved=event.exit_code != ExitCode.PREEMPTED_UNSAVED)
            case RunStarted():
                # Without an end before it: the last run was killed after its last entry.
                self._stop(before, failed=True)
                self._settle(saved=self._saved)

    def _stop(self, at: float, *, failed: bool) -> None:
        """End the training; after a notice the run's end decides whether it was a failure."""
        if self._since is None:
            return
        self._trained += max(0.0, at - self._since)
        self._since = None
        if failed and self._noticed:
            self._at_stake = True
        elif failed:
            self.failures += 1

    def _settle(self, *, saved: bool) -> None:
        if self._at_stake and not saved:
            self.failures += 1
        self._noticed = self._saved = self._at_stake = False
