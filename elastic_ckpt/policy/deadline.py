"""Preemption notices and the deadline that they set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Notice:
    """A notice that this node will be taken away.

    Attributes:
        source: the notice source, for example ``signal``.
        reason: what it reported, for example ``SIGTERM``.
        deadline: monotonic seconds.
        is_guess: the deadline is assumed; a known one replaces it, earlier or later.
    """

    source: str
    reason: str
    deadline: float
    is_guess: bool = False


@dataclass(frozen=True)
class EarlyWarning:
    """A warning that this node may be taken away: no deadline, and no reason to stop yet."""

    source: str
    reason: str


@dataclass(frozen=True)
class TimeLimit:
    """The end of this node's time, known long before; the listener turns it into a notice.

    A later one of the same source and reason replaces it. ``deadline`` is as in a notice.
    """

    source: str
    reason: str
    deadline: float


@dataclass(frozen=True)
class SourceStatus:
    """A source stopped answering or answers again, as ``what`` explains. The job continues."""

    source: str
    what: str


@dataclass(frozen=True)
class StopNow:
    """The user does not want to wait for a save."""


@dataclass(frozen=True)
class Reload:
    """The job file is to be read again."""


Incoming = Notice | EarlyWarning | StopNow | Reload
"""What the supervisor acts on; the listener deals with the rest."""

_LEAVE_AT_ONCE: Final = frozenset({"signal", "slurm"})


def may_wait(notice: Notice) -> bool:
    """Whether the run may outlast the notice; the sender of a signal waits for its end."""
    return notice.source not in _LEAVE_AT_ONCE


def is_by_hand(notice: Notice) -> bool:
    """Whether a person ends the job at a terminal; other notices take this node alone."""
    return notice.source == "signal" and notice.reason in ("SIGINT", "SIGHUP")


def tightest(current: Notice | None, new: Notice) -> Notice:
    """Return the notice with the earlier deadline; a known deadline replaces a guessed one."""
    if current is None or (current.is_guess and not new.is_guess):
        return new
    if new.deadline < current.deadline and not (new.is_guess and not current.is_guess):
        return new
    return current


def kill_time(notice: Notice, grace: float) -> float:
    """Return when to kill the workers, so that the supervisor can report before it is killed too.

    Args:
        notice: the notice being served.
        grace: seconds between the notice and its deadline.

    Returns:
        Monotonic seconds, at most one second before the deadline.
    """
    return notice.deadline - min(1.0, 0.1 * max(grace, 0.0))
