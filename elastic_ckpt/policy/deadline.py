"""Notices and the one deadline that they amount to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Notice:
    """Word that this node will go away.

    Attributes:
        source: who said it, for example ``signal``.
        reason: what it said, for example ``SIGTERM``.
        deadline: on the monotonic clock, in seconds.
        is_guess: the deadline is assumed; one that is known takes its place, earlier or later.
    """

    source: str
    reason: str
    deadline: float
    is_guess: bool = False


@dataclass(frozen=True)
class EarlyWarning:
    """Word that this node may go away some time: no deadline, and no reason to stop yet."""

    source: str
    reason: str


@dataclass(frozen=True)
class Limit:
    """When this node's time is over, known long before: a notice is due in time for a save.

    A later one of the same source and reason takes its place. ``deadline`` is as a notice's.
    """

    source: str
    reason: str
    deadline: float


@dataclass(frozen=True)
class Trouble:
    """A source is deaf, or hears again; ``what`` says which, for people. The job goes on."""

    source: str
    what: str


_LEAVE_AT_ONCE: Final = frozenset({"signal", "slurm"})


def may_wait(notice: Notice) -> bool:
    """Whether nobody waits for this run to end: who sends a signal does, and SLURM."""
    return notice.source not in _LEAVE_AT_ONCE


def tightest(current: Notice | None, new: Notice) -> Notice:
    """The notice that counts: the one with the earlier deadline; a repeat changes nothing."""
    if current is None or (current.is_guess and not new.is_guess):
        return new
    if new.deadline < current.deadline and not (new.is_guess and not current.is_guess):
        return new
    return current


def kill_time(notice: Notice, grace: float) -> float:
    """When to kill what still runs, so that the supervisor can report before it is killed too.

    Args:
        notice: the notice that counts.
        grace: seconds between the notice and its deadline.

    Returns:
        A time on the monotonic clock, in seconds, up to one second before the deadline.
    """
    return notice.deadline - min(1.0, 0.1 * max(grace, 0.0))
