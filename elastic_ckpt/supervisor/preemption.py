"""The notice that counts, and the time that it leaves."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final

from elastic_ckpt.jobdir.node_record import NoticeRecord
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.deadline import Notice, kill_time, tightest
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.supervisor.run_record import Account

CALLED_OFF_SECONDS: Final = 60.0
"""A node that is still there so long after its deadline stays."""

LEAST_SECONDS: Final = 5.0
"""For a deadline that a platform says has passed: to kill at once would save nothing for sure."""


class Preemption:
    """Of one run. Times are monotonic seconds.

    Attributes:
        notice: the one with the earliest deadline; None while this node stays.
        grace: seconds that it left when it came.
        held_until: no start before this, for a notice that came before one.
    """

    def __init__(self, grace: float, board: Board, journal: Journal, account: Account) -> None:
        self.notice: Notice | None = None
        self.grace = grace
        self.held_until = 0.0
        self._board = board
        self._journal = journal
        self._account = account

    def heed(self, notice: Notice) -> bool:
        """Take a notice; False if it changes nothing. The record is for the caller to write."""
        least = time.monotonic() + LEAST_SECONDS
        if notice.source != "signal" and notice.deadline < least:
            notice = replace(notice, deadline=least)
        chosen = tightest(self.notice, notice)
        if chosen is self.notice:
            return False
        self.notice = chosen
        self.grace = max(0.0, chosen.deadline - time.monotonic())
        self._board.deadline = chosen.deadline
        self._journal.note("notice", source=notice.source, reason=notice.reason, seconds=self.grace)
        self._account.record.notice = NoticeRecord(chosen.source, chosen.reason, chosen.deadline)
        return True

    def hold(self, notice: Notice) -> None:
        """Start nothing until the node has gone, or has been there for too long to go still."""
        self.held_until = max(self.held_until, notice.deadline + CALLED_OFF_SECONDS)
        left = notice.deadline - time.monotonic()
        self._journal.write("held", source=notice.source, reason=notice.reason, seconds=left)
        message = f"{notice.source}: {notice.reason}: this node goes away in {left:.0f} s: waiting"
        self._account.say(message)
        self._account.update(message=message)

    def left(self, now: float) -> float:
        """Seconds until what still runs must be killed; infinite without a notice."""
        if self.notice is None:
            return float("inf")
        return kill_time(self.notice, self.grace) - now
