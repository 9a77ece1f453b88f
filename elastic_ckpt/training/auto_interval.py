"""When a Session saves of its own: every so many steps, or, without a supervisor, by time."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from elastic_ckpt.policy.interval import (
    DEFAULT_MTBF_SECONDS,
    FIRST_INTERVAL,
    FIRST_SAVE_SECONDS,
    SaveInterval,
    optimal_interval,
)
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.util.units import human_duration

KEPT: Final = 2
"""Automatic checkpoints that are kept: the newest, and one more in case it is damaged."""

_COSTS: Final = 5
"""Number of saves whose median is the cost of one."""


class Interval(Protocol):
    """Says when to save; all ranks call it after the same steps, and receive the same answer."""

    def due(self, step: int) -> bool:
        """Return whether to save after this step."""


def choose_interval(
    runtime: Runtime,
    steps: int | None,
    how: str = "give the Session save_interval= and retention=",
) -> Interval:
    """Return when a session saves, and say it if neither the user nor the script chose that.

    Args:
        steps: between two saves; 0 or less for none, None for automatic saves.
        how: what to type to choose it.
    """
    if steps is not None:
        return SaveInterval(steps=max(0, steps))
    if not runtime.retain.rule:
        runtime.retain.rule = Retention(automatic=KEPT)
    if not runtime.sessions.names:
        kept = f", keeping the last {KEPT} of them" if runtime.retain.rule.automatic else ""
        runtime.leader_says(
            f"saving automatically{kept}: first after {human_duration(FIRST_SAVE_SECONDS)}, then "
            f"as often as pays; to choose, {how}, or use --save-interval and --keep-last"
        )
    if runtime.supervised is not None:  # it asks for each save
        return SaveInterval()
    return AutoInterval(runtime.peers)


class AutoInterval:
    """As often as pays, without a supervisor: as ``--save-interval auto`` of one that never fails.

    The leader's clock decides. At some steps, fewer and fewer of them while there is time, all
    ranks learn from it whether to save, and when to ask again.
    """

    def __init__(self, peers: Peers, clock: Callable[[], float] = time.monotonic) -> None:
        self._peers = peers
        self._clock = clock
        self._seconds = FIRST_INTERVAL.seconds
        self._costs: deque[float] = deque(maxlen=_COSTS)
        self._saved = self._looked = clock()
        self._looked_at = -1
        self._look_at = 0
        self._pace = 0.0
        self._measures = False

    def due(self, step: int) -> bool:
        """Return whether to save after this step. Collective at some steps."""
        if step < self._look_at:
            return False
        said = self._look(step) if self._peers.is_leader else b""
        due, self._look_at = map(int, self._peers.tell("interval", said).split())
        return bool(due)

    def _look(self, step: int) -> bytes:
        now = self._clock()
        steps = max(1, step - self._looked_at)
        pace = (now - self._looked) / steps if self._looked_at >= 0 else 0.0
        if self._measures:  # the last step includes the save
            self._costs.append(max(0.0, pace - self._pace))
            cost = statistics.median(self._costs)
            self._seconds = optimal_interval(cost, DEFAULT_MTBF_SECONDS, self._seconds).seconds
        elif pace:
            self._pace = pace
        self._looked, self._looked_at = now, step
        left = self._saved + self._seconds - now
        self._measures = left <= 0 and self._pace > 0
        if self._measures:
            self._saved = now
            return f"1 {step + 1}".encode()
        wait = int(left / self._pace / 2) if self._pace else 1
        return f"0 {step + max(1, min(wait, 10**9))}".encode()
