"""Which node keeps a replica of which other's share: pure."""

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


def _steps(order: Sequence[Share]) -> list[int]:
    """Return how far ahead the shares lie that a node keeps, the best choice first."""
    count = len(order)
    largest = max(Counter(one.domain for one in order).values(), default=0)
    # Of two domains of equal size each step but this one stays within one for somebody.
    far = [step % count for step in range(largest, count, max(1, largest))]
    return list(dict.fromkeys(step for step in (*far, *range(1, count)) if step))
