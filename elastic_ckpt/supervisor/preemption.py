"""The notice that counts, and the time that it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, Protocol

from elastic_ckpt.jobdir.node_record import NoticeRecord
from elastic_ckpt.journal.events import NoticeReceived, StartHeld
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.deadline import Incoming, Notice, StopNow, kill_time, tightest
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.supervisor.ports import Clock
from elastic_ckpt.supervisor.run_record import RunRecord

CALLED_OFF_SECONDS: Final = 60.0
"""If the node outlives its deadline by this much, the preemption was cancelled."""

MIN_SECONDS: Final = 5.0
"""Left where a platform reports a deadline as past: to kill at once would surely save nothing."""

MIN_PATIENCE_SECONDS: Final = 0.02
"""What a wait may take even after the deadline: storage that is well answers within it."""

IMPATIENT_SECONDS: Final = 0.25
"""What a wait may take once the user does not want to wait."""


class Arrivals(Protocol):
    """Takes in what the notice sources report."""

    @property
    def pending(self) -> bool: ...  # noqa: D102

    def take_in(self, now: float, lead: Callable[[], float]) -> Iterator[Incoming]: ...  # noqa: D102


class Preemption:
    """State of the notice being served in one run. Times are monotonic seconds.

    Attributes:
        notice: the one with the earliest deadline; None while this node stays.
        grace: seconds that it left when it came.
        held_until: no start before this, for a notice that came before one.
        stops_at_once: the user does not want to wait.
    """

    def __init__(
        self, grace: float, clock: Clock, board: Board, journal: Journal, record: RunRecord
    ) -> None:
        self.notice: Notice | None = None
        self.grace = grace
        self.held_until = 0.0
        self.stops_at_once = False
        self._clock = clock
        self._board = board
        self._journal = journal
        self._record = record

    def take(self, notice: Notice) -> bool:
        """Put the notice's deadline on the board; False if it changes nothing.

        Touches no disk: the caller publishes the record once it has asked for the save.
        """
        now = self._clock.monotonic()
        if notice.source != "signal" and notice.deadline < now + MIN_SECONDS:
            notice = replace(notice, deadline=now + MIN_SECONDS)
        chosen = tightest(self.notice, notice)
        if chosen is self.notice:
            return False
        self.notice = chosen
        self.grace = max(0.0, chosen.deadline - now)
        self._board.deadline = chosen.deadline
        self._journal.note(
            NoticeReceived(source=notice.source, reason=notice.reason, seconds=self.grace)
        )
        self._record.node.notice = NoticeRecord(chosen.source, chosen.reason, chosen.deadline)
        return True

    @property
    def said(self) -> str:
        """One line on the notice, with the time that it left when it came, if that is known."""
        notice = self.notice
        if notice is None:
            return ""
        begin = f"{notice.reason}: saving, "
        if notice.is_guess:
            return f"{begin}and asking SLURM how long that may take"
        twice = "; Ctrl-C twice within 3 s stops at once" * (notice.reason == "SIGINT")
        return f"{begin}{self.grace:.0f} s left{twice}"

    def hold(self, notice: Notice) -> None:
        """Start nothing until the node has gone, or has outlived the notice's deadline."""
        self.held_until = max(self.held_until, notice.deadline + CALLED_OFF_SECONDS)
        now = self._clock.monotonic()
        left = notice.deadline - now
        self._journal.write(StartHeld(source=notice.source, reason=notice.reason, seconds=left))
        starts = time.localtime(self._clock.wall() + self.held_until - now)
        message = (
            f"{notice.source}: {notice.reason}: this node goes away in {max(0.0, left):.0f} s: "
            f"waiting; the job starts at {time.strftime('%H:%M:%S', starts)} if it is still there"
        )
        self._record.say(message)
        self._record.update(message=message)

    def patience(self, seconds: float) -> float:
        """Return how long a wait may take, of which a deadline leaves less than ``seconds``.

        It is a quarter of the time until the deadline at most: a run that ends has up to three
        waits, and must be gone by then.
        """
        if self.stops_at_once:
            seconds = min(seconds, IMPATIENT_SECONDS)
        if self.notice is None:
            return seconds
        until = self.notice.deadline - self._clock.monotonic()
        return max(MIN_PATIENCE_SECONDS, min(seconds, until / 4))

    def tighten(self, listener: Arrivals) -> None:
        """Take in notices while the run ends: there may be less time."""
        for event in listener.take_in(self._clock.monotonic(), lambda: 0.0):
            if isinstance(event, Notice):
                self.take(event)
            elif isinstance(event, StopNow):
                self.stops_at_once = True

    def waiting(
        self, seconds: float, listener: Arrivals, *, ends: bool = True
    ) -> Callable[[], float]:
        """Return what says how long a wait that begins now may still take.

        A notice that comes during the wait shortens it. If the run does not end after the wait,
        the wait is soon over: the loop has to serve the notice.
        """
        began = self._clock.monotonic()
        until = began + self.patience(seconds)

        def left() -> float:
            nonlocal until
            if listener.pending and not ends:
                until = min(until, began + IMPATIENT_SECONDS)
            elif listener.pending:
                self.tighten(listener)
                until = min(until, self._clock.monotonic() + self.patience(seconds))
            return until - self._clock.monotonic()

        return left

    def left(self, now: float) -> float:
        """Return the seconds until what still runs must be killed; infinite without a notice."""
        if self.notice is None:
            return float("inf")
        return kill_time(self.notice, self.grace) - now
