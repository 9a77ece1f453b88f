"""How much of the time since the job began went into training that still counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

_Other = TypeVar("_Other", float, None)


class _Event(Protocol):
    @property
    def event(self) -> str: ...
    @property
    def wall(self) -> float: ...
    @property
    def data(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Goodput:
    """Seconds of a job's life so far.

    Attributes:
        wall_seconds: since the first start.
        training_seconds: between first step and end of each incarnation, less the two below.
        stall_seconds: training waited for a save.
        lost_work_seconds: steps that a crash threw away.
    """

    wall_seconds: float = 0.0
    training_seconds: float = 0.0
    stall_seconds: float = 0.0
    lost_work_seconds: float = 0.0

    @property
    def fraction(self) -> float | None:
        """Training time over all time; None before there was any."""
        return self.training_seconds / self.wall_seconds if self.wall_seconds > 0 else None


def number(value: Any, otherwise: _Other) -> float | _Other:
    """A number of a journal that another version may have written."""
    try:
        return float(value) if isinstance(value, int | float) else otherwise
    except OverflowError:
        return otherwise


def account(events: Iterable[_Event], now: float | None = None) -> Goodput:
    """Fold a journal.

    Args:
        events: in order of time.
        now: seconds since the epoch if the job runs, None if its last event is its end.
    """
    first: float | None = None
    last = 0.0
    began: float | None = None  # first step of the incarnation that runs
    kept = 0.0  # when its newest checkpoint was sealed
    training = stall = lost = 0.0
    for event in events:
        if event.data.get("follows"):
            continue  # of a node that follows another one, whose word counts
        first = event.wall if first is None else first
        before, last = (last or event.wall), event.wall
        if event.event == "state" and event.data.get("state") == "running":
            began = kept = event.wall
        elif event.event == "saved" and began is not None:
            kept = event.wall
            stall += number(event.data.get("stall_seconds"), 0.0)
        elif event.event in ("ended", "crash", "end", "start") and began is not None:
            # A new start without an end: the run was killed some time after its last event.
            until = before if event.event == "start" else event.wall
            training += until - began
            if event.event != "ended" or event.data.get("kind") == "crashed":
                lost += until - kept
            began = None
    if first is None:
        return Goodput()
    end = last if now is None else now
    if began is not None:
        training += end - began
    training = max(0.0, training - stall - lost)
    return Goodput(max(0.0, end - first), training, stall, lost)
