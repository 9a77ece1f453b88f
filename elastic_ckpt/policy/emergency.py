"""What to save before a node goes: everything, to the disk or into the memory of nodes that stay,
the newest snapshot in memory, or nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from elastic_ckpt.policy.prediction import Predictor, Route
from elastic_ckpt.util.units import human_duration

LAST_MOMENT_SECONDS: Final = 1.0
"""Time for the ranks to be killed before a drain must begin."""

WORTH_SECONDS: Final = 1.0
"""By which a node has to be free sooner if the disk has nothing of its work yet."""


class ChoiceKind(Enum):
    """What to do in the time that is left."""

    FULL = "full"  # save straight to the disk
    PEER = "peer"  # save into memory, of which nodes that stay keep what this one has
    DRAIN_NEWEST = "drain-newest"  # copy the newest snapshot from memory to the disk
    NOTHING = "nothing"  # rely on the checkpoint on the disk


@dataclass(frozen=True)
class Outlook:
    """What is known when a notice arrives.

    Attributes:
        grace_left: seconds until the deadline.
        rest_of_step: seconds until the ranks could start to save.
        save_bytes: size of a save.
        undrained_bytes: bytes of the newest snapshot in memory that are not on the disk yet; None
            without a snapshot, or if the disk has it already.
        saving_seconds: how long the ranks have been writing to the disk; None if they are not.
        is_late: a step takes so much longer than usual that nothing is known of its end.
        uploads: what is on the disk counts once a bucket has it, too.
        peer_bytes: of a save, what the node has of it that leaves, and another one can keep; None
            if none can.
    """

    grace_left: float
    rest_of_step: float
    save_bytes: int
    undrained_bytes: int | None = None
    saving_seconds: float | None = None
    is_late: bool = False
    uploads: bool = False
    peer_bytes: int | None = None


@dataclass(frozen=True)
class EmergencyChoice:
    """What to do, and why.

    Attributes:
        predicted_seconds: how long it takes, including the margin; None if nothing is known.
        why: one sentence for the log.
    """

    kind: ChoiceKind
    predicted_seconds: float | None
    why: str


@dataclass(frozen=True)
class _Cost:
    """Seconds that an action takes at the two ends of the margin."""

    best: float
    worst: float


def choose(predictor: Predictor, outlook: Outlook) -> EmergencyChoice:
    """Return the action that keeps the most work among those that can finish in time.

    An action that certainly fits beats one that might, even if the latter would keep more: a save
    that is cut off keeps nothing. If none certainly fits, the quickest that might is tried, since
    doing nothing loses as much. A save with no known duration is tried as well. A save to the disk
    and one into memory, of which nodes that stay keep what this one has, keep as much: the latter
    is taken if the node is free sooner by ``WORTH_SECONDS``, as the disk has nothing of it yet.

    Called again as time passes: a step or a save that takes longer than expected is waited for
    only as long as a drain would still fit after it.

    Where a bucket is the job's place, an action that leaves time for the upload beats one that does
    not; without one, the disk is at least what this machine comes back to.
    """
    upload = _upload_cost(predictor, outlook)
    if upload is not None:
        before = replace(outlook, grace_left=outlook.grace_left - upload.worst)
        found = _certain(predictor, before)
        if found is not None:
            then = f"{found.why} before an upload of up to {human_duration(upload.worst)}"
            return replace(found, why=then)
    return _certain(predictor, outlook) or _possible(predictor, outlook)


def _certain(predictor: Predictor, outlook: Outlook) -> EmergencyChoice | None:
    left = outlook.grace_left
    costs = _costs(predictor, outlook)
    fits = [kind for kind in _by_preference(costs) if costs[kind].worst <= left]
    drain = costs.get(ChoiceKind.DRAIN_NEWEST)
    if drain is not None and ChoiceKind.DRAIN_NEWEST in fits and _is_overdue(predictor, outlook):
        is_last_moment = drain.worst + LAST_MOMENT_SECONDS >= left
        fits = fits[-1:] if is_last_moment else fits
    if not fits:
        return None
    return EmergencyChoice(fits[0], costs[fits[0]].worst, _why(fits[0], costs, left))


def _by_preference(costs: dict[ChoiceKind, _Cost]) -> list[ChoiceKind]:
    full, peer = costs.get(ChoiceKind.FULL), costs.get(ChoiceKind.PEER)
    is_worth = full is None or (peer is not None and peer.worst + WORTH_SECONDS < full.worst)
    whole = (ChoiceKind.PEER, ChoiceKind.FULL) if is_worth else _WHOLE
    return [kind for kind in (*whole, ChoiceKind.DRAIN_NEWEST) if kind in costs]


def _possible(predictor: Predictor, outlook: Outlook) -> EmergencyChoice:
    left, costs = outlook.grace_left, _costs(predictor, outlook)
    unknown = _unknown(predictor, outlook)
    if unknown is not None:
        return unknown
    possible = {kind: cost for kind, cost in costs.items() if cost.best <= left}
    if possible:
        kind = min(possible, key=lambda each: possible[each].worst)
        return EmergencyChoice(
            kind, costs[kind].worst, f"{_why(kind, costs, left)}: it may still fit"
        )
    return EmergencyChoice(ChoiceKind.NOTHING, 0.0, _why(ChoiceKind.NOTHING, costs, left))


def save_seconds(predictor: Predictor, outlook: Outlook) -> float | None:
    """Return how long a whole save takes in the worst case, to the disk and, if it ``uploads`` and
    that was measured, to the bucket; None if unknown."""
    cost = _costs(predictor, outlook).get(ChoiceKind.FULL)
    upload = _upload_cost(predictor, outlook)
    return None if cost is None else cost.worst + (upload.worst if upload else 0.0)


def _upload_cost(predictor: Predictor, outlook: Outlook) -> _Cost | None:
    return _cost(predictor, Route.UPLOAD, outlook.save_bytes) if outlook.uploads else None


def _costs(predictor: Predictor, outlook: Outlook) -> dict[ChoiceKind, _Cost]:
    """Return the cost of each action that is possible and whose cost is known."""
    costs = {
        ChoiceKind.FULL: _full_cost(predictor, outlook),
        ChoiceKind.PEER: _peer_cost(predictor, outlook),
    }
    if outlook.undrained_bytes is not None:
        costs[ChoiceKind.DRAIN_NEWEST] = _cost(predictor, Route.DRAIN, outlook.undrained_bytes)
    return {kind: cost for kind, cost in costs.items() if cost is not None}


def _full_cost(predictor: Predictor, outlook: Outlook) -> _Cost | None:
    spent = outlook.saving_seconds
    if spent is None:
        return _cost(predictor, Route.DISK, outlook.save_bytes, outlook.rest_of_step)
    whole = _cost(predictor, Route.DISK, outlook.save_bytes)
    if whole is None:
        return None
    # One that takes longer than it ever should is assumed to need as long again.
    worst = whole.worst - spent if spent < whole.worst else whole.worst
    return _Cost(max(0.0, whole.best - spent), worst)


def _peer_cost(predictor: Predictor, outlook: Outlook) -> _Cost | None:
    """Return the cost of a save into memory and of the copy to a peer; None if that was never
    measured, or the ranks are writing already."""
    if outlook.peer_bytes is None or outlook.saving_seconds is not None:
        return None
    if Route.MEMORY not in predictor.routes:  # its stand-in is the disk
        return None
    save = _cost(predictor, Route.MEMORY, outlook.save_bytes, outlook.rest_of_step)
    copy = _cost(predictor, Route.PEER, outlook.peer_bytes)
    if save is None or copy is None:
        return None
    return _Cost(save.best + copy.best, save.worst + copy.worst)


def _is_overdue(predictor: Predictor, outlook: Outlook) -> bool:
    """Return whether the estimate of a whole save is worth nothing."""
    spent = outlook.saving_seconds
    if spent is None:
        return outlook.is_late
    whole = _cost(predictor, Route.DISK, outlook.save_bytes)
    return whole is not None and spent >= whole.worst


def _cost(predictor: Predictor, route: Route, size: int, rest: float = 0.0) -> _Cost | None:
    expected = predictor.expect(route, size)
    if expected is None:
        return None
    margin = predictor.margin(route)
    return _Cost(rest + expected / margin, rest + expected * margin)


def _unknown(predictor: Predictor, outlook: Outlook) -> EmergencyChoice | None:
    """Return the choice if the disk was never measured; None if it was.

    A save is tried if it can start in time; otherwise a snapshot is drained.
    """
    left, start = outlook.grace_left, outlook.rest_of_step
    if predictor.expect(Route.DISK, 0) is not None:
        return None
    peer = _peer_cost(predictor, outlook)
    if peer is not None and peer.best <= left:
        why = f"{_LABELS[ChoiceKind.PEER]} may still fit, and no write to the disk was measured yet"
        return EmergencyChoice(ChoiceKind.PEER, peer.worst, why)
    unmeasured = "no write to the disk was measured yet"
    if start <= left:
        return EmergencyChoice(
            ChoiceKind.FULL, None, f"trying a save within {human_duration(left)}: {unmeasured}"
        )
    if outlook.undrained_bytes is None:
        why = (
            f"a save could only start in {human_duration(start)}, with {human_duration(left)} left"
        )
        return EmergencyChoice(ChoiceKind.NOTHING, 0.0, why)
    return EmergencyChoice(
        ChoiceKind.DRAIN_NEWEST,
        None,
        f"trying to drain the newest snapshot within {human_duration(left)}: {unmeasured}",
    )


_WHOLE: Final = (ChoiceKind.FULL, ChoiceKind.PEER)
"""What keeps all work."""

_LABELS: Final[dict[ChoiceKind, str]] = {
    ChoiceKind.FULL: "a save to the disk",
    ChoiceKind.PEER: "a save into memory with a copy on a node that stays",
    ChoiceKind.DRAIN_NEWEST: "a drain of the newest snapshot",
}


def _why(chosen: ChoiceKind, costs: dict[ChoiceKind, _Cost], left: float) -> str:
    """Return, for example: ``a save to the disk takes up to 9 s, with 5 s left``."""
    shown = [kind for kind in _LABELS if kind in costs]
    if chosen in _WHOLE:
        shown = [kind for kind in shown if kind in _WHOLE]  # a drain was not considered
    parts = [f"{_LABELS[kind]} takes up to {human_duration(costs[kind].worst)}" for kind in shown]
    return f"{', '.join(parts)}, with {human_duration(left)} left"
