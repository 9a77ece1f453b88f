"""What each interruption cost: lost work, recovery and waiting, which add up to the account."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from elastic_ckpt.journal.history_types import Incarnation, Interruption
from elastic_ckpt.journal.time_account import Category, Span

_CLOSE: Final = 1e-6
"""Seconds by which sums of floats may differ."""


@dataclass
class Cost:
    """The cost of one interruption.

    Attributes:
        lost_steps: steps that had to be repeated; None if unknown, or if none was repeated yet.
        back_at: when the next first step started; None if it has not.
    """

    lost_seconds: float = 0.0
    lost_steps: int | None = None
    recovery_seconds: float = 0.0
    waiting_seconds: float = 0.0
    back_at: float | None = None

    @property
    def seconds(self) -> float:
        """The sum, in seconds."""
        return self.lost_seconds + self.recovery_seconds + self.waiting_seconds


def costs(
    interruptions: Sequence[Interruption],
    incarnations: Sequence[Incarnation],
    spans: Sequence[Span],
    *,
    restarts_count: bool = False,
) -> list[Cost]:
    """Return the cost of each interruption, in order.

    A pause in training belongs to the interruption that it starts with; further interruptions
    within the pause divide it. A pause without an interruption belongs to none. Lost work belongs
    to the first interruption before the incarnation that no longer had it.

    Args:
        spans: of the whole account.
        restarts_count: the script restarts its step count in each epoch.
    """
    found = [Cost() for _ in interruptions]
    if not found:
        return found
    books = _Books(interruptions, [one for one in incarnations if one.first_step_at is not None])
    for span in spans:
        if span.category is Category.LOST_WORK:
            found[books.who_lost(span)].lost_seconds += span.seconds
    for pause in _pauses(spans):
        for index, category, seconds in books.shares(pause):
            if category is Category.RECOVERY:
                found[index].recovery_seconds += seconds
            else:
                found[index].waiting_seconds += seconds
    books.add_returns(found, restarts_count)
    return found


def _pauses(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Yield the consecutive spans of recovery and waiting of each pause."""
    pause: list[Span] = []
    for span in spans:
        if span.category in (Category.RECOVERY, Category.WAITING):
            pause.append(span)
        elif pause:
            yield pause
            pause = []
    if pause:
        yield pause


class _Books:
    """Assigns moments to interruptions."""

    def __init__(
        self, interruptions: Sequence[Interruption], trained: Sequence[Incarnation]
    ) -> None:
        self._at = [one.at for one in interruptions]
        self._trained = trained
        self._starts = [one.first_step_at or 0.0 for one in trained]

    def who_lost(self, span: Span) -> int:
        """Return the index of the interruption that the work of a span was lost to."""
        first = bisect_left(self._starts, span.ended - _CLOSE)
        for index in range(first, len(self._trained)):
            one = self._trained[index]
            moment = -math.inf if one.since is None and one.from_step == 0 else one.since
            if moment is None or moment <= span.began + _CLOSE:
                return self._first_after(self._starts[index - 1] if index else -math.inf)
        return self._first_after(self._starts[-1] if self._starts else -math.inf)

    def shares(self, pause: Sequence[Span]) -> Iterator[tuple[int, Category, float]]:
        """Divide a pause: yield the index of the interruption, the category and the seconds."""
        began, ended = pause[0].began, pause[-1].ended
        first = bisect_left(self._at, began - _CLOSE)
        last = bisect_right(self._at, ended + _CLOSE)
        if first == last:  # after a job had finished, or while it waited for nodes
            return
        edges = [-math.inf, *self._at[first + 1 : last], math.inf]
        for span in pause:
            low = bisect_right(edges, span.began) - 1
            while low < len(edges) - 1 and edges[low] < span.ended:
                seconds = min(span.ended, edges[low + 1]) - max(span.began, edges[low])
                yield first + low, span.category, max(0.0, seconds)
                low += 1

    def add_returns(self, found: list[Cost], restarts_count: bool) -> None:
        """Fill in when training was back, and how many steps each interruption lost."""
        for index, cost in enumerate(found):
            following = bisect_right(self._starts, self._at[index])
            limit = self._at[index + 1] if index + 1 < len(found) else math.inf
            if following < len(self._starts) and self._starts[following] <= limit:
                cost.back_at = self._starts[following]
            owner = self._first_after(self._starts[following - 1] if following else -math.inf)
            if owner == index and 0 < following < len(self._trained):
                cost.lost_steps = _steps_between(
                    self._trained[following], self._trained[following - 1], restarts_count
                )

    def _first_after(self, moment: float) -> int:
        return min(bisect_right(self._at, moment), len(self._at) - 1)


def _steps_between(now: Incarnation, before: Incarnation, restarts_count: bool) -> int | None:
    """Return the steps that one incarnation finished and the next one repeats."""
    if now.from_step is None or before.reached_step is None or now.tier == "own":
        return None  # of a script without a Session only its saves are seen
    if restarts_count and now.from_epoch != before.reached_epoch:
        return None
    return max(0, before.reached_step - now.from_step)
