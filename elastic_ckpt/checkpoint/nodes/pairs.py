"""Which node keeps which other's share, as a replica or because the other one leaves: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from elastic_ckpt.checkpoint.memory.seal import Share


def guarded_by(node: Share, shares: Sequence[Share], replicas: int) -> tuple[Share, ...]:
    """Return the shares of which a node keeps replicas, so that each share has this number of them,
    in other domains if no domain has more than half of the nodes.

    With the nodes in the order of their domains, the one that lies as many places ahead as the
    largest domain has nodes is in another one.
    """
    order = sorted(shares, key=lambda one: (one.domain, one.first))
    count = len(order)
    at = next(place for place, one in enumerate(order) if one.first == node.first)
    return tuple(order[(at + step) % count] for step in _steps(order)[:replicas])


def sealer(shares: Sequence[Share]) -> Share:
    """Return the share whose seal is the last, and says where the others are: that of the leader,
    or if the leader's node leaves, of the first that stays, which leads next."""
    order = sorted(shares, key=lambda one: one.first)
    return next((one for one in order if not one.leaves), order[0])


def may_hand_over(shares: Sequence[Share]) -> bool:
    """Return whether the nodes that stay can keep what those that leave have: some do either, and a
    leader leaves alone, as only then it knows that enough others stay."""
    leaving = [one for one in shares if one.leaves]
    leads = any(one.first == 0 for one in leaving)
    return 0 < len(leaving) < len(shares) and (not leads or len(leaving) == 1)


def keepers(node: Share, shares: Sequence[Share]) -> tuple[Share, ...]:
    """Return the nodes that may keep the share of one that leaves, the best choice first: in other
    domains, and others for each node that leaves."""
    order = sorted(shares, key=lambda one: (one.domain, one.first))
    at = next(place for place, one in enumerate(order) if one.first == node.first)
    ahead = [order[(at + step) % len(order)] for step in _steps(order)]
    return tuple(one for one in ahead if not one.leaves)


def _steps(order: Sequence[Share]) -> list[int]:
    """Return how far ahead the shares lie that a node keeps, the best choice first."""
    count = len(order)
    largest = max(Counter(one.domain for one in order).values(), default=0)
    # Of two domains of equal size each step but this one stays within one for somebody.
    far = [step % count for step in range(largest, count, max(1, largest))]
    return list(dict.fromkeys(step for step in (*far, *range(1, count)) if step))
