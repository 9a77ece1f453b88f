"""How long a job has trained and how often it failed, over all of its runs.

A failure is what throws work away: a crash, a node that went without notice, a notice within which
nothing was saved. A preemption that was saved within its grace loses nothing, and is no reason to
save more often.
"""

from __future__ import annotations

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.journal.fields import Entry


class FailureHistory:
    """Folds a job's journal, event by event, in order of time.

    Attributes:
        failures: how often work was lost.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._trained = 0.0
        self._since: float | None = None  # the first step of the incarnation that runs
        self._last: float | None = None
        self._noticed = False
        self._saved = False  # since the notice
        self._at_stake = False  # a notice came, and the run's end will say whether work was lost

    def trained_seconds(self, now: float) -> float:
        """Seconds in which the job trained until ``now``, on the wall clock."""
        running = 0.0 if self._since is None else max(0.0, now - self._since)
        return self._trained + running

    def observe(self, event: Entry) -> None:
        """Take the next event into account."""
        if event.data.get("follows"):
            return  # of a node that follows another one
        before = event.wall if self._last is None else self._last
        self._last = event.wall
        match event.event:
            case "state" if event.data.get("state") == "running":
                self._since = event.wall
            case "notice":
                self._noticed = True
            case "saved":
                self._saved = self._noticed
            case "ended" if event.data.get("kind") == "completed" or self._regroups(event):
                self._stop(event.wall, failed=False)
            case "ended" | "crash":
                self._stop(event.wall, failed=True)
            case "end":
                self._stop(event.wall, failed=True)
                self._settle(saved=event.data.get("exit_code") != ExitCode.PREEMPTED_UNSAVED)
            case "start":
                # Without an end before it: the last run was killed after its last event.
                self._stop(before, failed=True)
                self._settle(saved=self._saved)

    def _regroups(self, event: Entry) -> bool:
        """Whether all ranks left for an incarnation of other nodes, a checkpoint sealed."""
        return not self._noticed and event.data.get("kind") in ("stopped", "not-begun")

    def _stop(self, at: float, *, failed: bool) -> None:
        """Training has come to an end; after a notice it is open whether it was a failure."""
        if self._since is None:
            return
        self._trained += max(0.0, at - self._since)
        self._since = None
        if failed and self._noticed:
            self._at_stake = True
        elif failed:
            self.failures += 1

    def _settle(self, *, saved: bool) -> None:
        """The run is over."""
        if self._at_stake and not saved:
            self.failures += 1
        self._noticed = self._saved = self._at_stake = False
