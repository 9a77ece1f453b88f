"""What to save when a node is about to go: everything, what is in memory already, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastic_ckpt.policy.prediction import Predictor, Route
from elastic_ckpt.util.units import human_duration


class ChoiceKind(Enum):
    """What can be done with the time that is left."""

    FULL = "full"  # save, straight to the disk
    DRAIN_NEWEST = "drain-newest"  # bring the newest snapshot in memory to the disk
    NOTHING = "nothing"  # the checkpoint that is on the disk counts


@dataclass(frozen=True)
class Outlook:
    """What is at hand when a notice comes.

    Attributes:
        grace_left: seconds until all must be done.
        rest_of_step: seconds until the ranks could begin to save.
        save_bytes: what a save would write.
        undrained_bytes: what the newest snapshot in memory still has to bring to the disk; None if
            there is none, or the disk has it already.
    """

    grace_left: float
    rest_of_step: float
    save_bytes: int
    undrained_bytes: int | None = None


@dataclass(frozen=True)
class Choice:
    """What to do, and why.

    Attributes:
        predicted_seconds: how long it takes, with the margin; None if nothing is known.
        why: one sentence, for people.
    """

    kind: ChoiceKind
    predicted_seconds: float | None
    why: str


@dataclass(frozen=True)
class _Cost:
    """Seconds of an action, in the best and in the worst case that the margins allow."""

    best: float
    worst: float


def choose(predictor: Predictor, outlook: Outlook) -> Choice:
    """What saves most of the work among what can be done in time.

    What is sure to fit goes before what may fit, even if that would save more: a save that is cut
    off saves nothing. Where nothing is sure, the quickest of what may fit is tried, because to do
    nothing loses as much. A save of which nothing is known is tried, too.
    """
    left = outlook.grace_left
    costs = _costs(predictor, outlook)
    for kind in (ChoiceKind.FULL, ChoiceKind.DRAIN_NEWEST):
        cost = costs.get(kind)
        if cost is not None and cost.worst <= left:
            return Choice(kind, cost.worst, _why(kind, costs, left))
    unknown = _unknown(predictor, outlook)
    if unknown is not None:
        return unknown
    possible = {kind: cost for kind, cost in costs.items() if cost.best <= left}
    if possible:
        kind = min(possible, key=lambda each: possible[each].worst)
        return Choice(kind, costs[kind].worst, f"{_why(kind, costs, left)}: it may still fit")
    return Choice(ChoiceKind.NOTHING, 0.0, _why(ChoiceKind.NOTHING, costs, left))


def save_seconds(predictor: Predictor, outlook: Outlook) -> float | None:
    """How long a whole save takes until it is on the disk, at the worst; None if nobody knows."""
    cost = _costs(predictor, outlook).get(ChoiceKind.FULL)
    return None if cost is None else cost.worst


def _costs(predictor: Predictor, outlook: Outlook) -> dict[ChoiceKind, _Cost]:
    """What each action takes, of those that are there to be had and of which something is known."""
    costs = {
        ChoiceKind.FULL: _cost(predictor, Route.DISK, outlook.save_bytes, outlook.rest_of_step)
    }
    if outlook.undrained_bytes is not None:
        costs[ChoiceKind.DRAIN_NEWEST] = _cost(predictor, Route.DRAIN, outlook.undrained_bytes)
    return {kind: cost for kind, cost in costs.items() if cost is not None}


def _cost(predictor: Predictor, route: Route, size: int, rest: float = 0.0) -> _Cost | None:
    expected = predictor.expect(route, size)
    if expected is None:
        return None
    margin = predictor.margin(route)
    return _Cost(rest + expected / margin, rest + expected * margin)


def _unknown(predictor: Predictor, outlook: Outlook) -> Choice | None:
    """The choice where the way to the disk was never measured; None where it was.

    A save is tried, unless it would not even begin in time: then a snapshot is drained.
    """
    left, begins = outlook.grace_left, outlook.rest_of_step
    if predictor.expect(Route.DISK, 0) is not None:
        return None
    nobody_knows = "nobody knows yet how long it takes to the disk"
    if begins <= left:
        return Choice(
            ChoiceKind.FULL, None, f"trying a save within {human_duration(left)}: {nobody_knows}"
        )
    if outlook.undrained_bytes is None:
        why = f"a save would begin after {human_duration(begins)}, with {human_duration(left)} left"
        return Choice(ChoiceKind.NOTHING, 0.0, why)
    return Choice(
        ChoiceKind.DRAIN_NEWEST,
        None,
        f"trying to drain the newest snapshot within {human_duration(left)}: {nobody_knows}",
    )


_DOES: dict[ChoiceKind, str] = {
    ChoiceKind.FULL: "a save to the disk",
    ChoiceKind.DRAIN_NEWEST: "a drain of the newest snapshot",
}


def _why(chosen: ChoiceKind, costs: dict[ChoiceKind, _Cost], left: float) -> str:
    """``a save to the disk takes up to 9 s, a drain of the newest snapshot 4 s, with 5 s left``."""
    shown = [kind for kind in _DOES if kind in costs]
    if chosen in shown:
        shown = shown[: shown.index(chosen) + 1]  # what comes behind it was not needed
    parts = [f"{_DOES[kind]} takes up to {human_duration(costs[kind].worst)}" for kind in shown]
    return f"{', '.join(parts)}, with {human_duration(left)} left"
