"""What each interruption cost: lost work, recovery and waiting, which add up to the account's."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from elastic_ckpt.journal.history_types import Incarnation, Interruption
from elastic_ckpt.journal.time_account import Category, Span

_CLOSE: Final = 1e-6
"""Seconds by which sums of floats may miss each other."""


@dataclass
class Cost:
    """Of one interruption, in seconds.

    Attributes:
        lost_steps: how many had to be done again; None if nobody knows, or none was yet.
        back_at: when the next first step began; None if it did not.
    """

    lost_seconds: float = 0.0
    lost_steps: int | None = None
    recovery_seconds: float = 0.0
    waiting_seconds: float = 0.0
    back_at: float | None = None

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.lost_seconds + self.recovery_seconds + self.waiting_seconds


def costs(
    interruptions: Sequence[Interruption],
    incarnations: Sequence[Incarnation],
    spans: Sequence[Span],
    *,
    counts_anew: bool = False,
) -> list[Cost]:
    """One for each interruption, in their order.

    A pause, in which nobody trains, belongs to the interruption that it begins with, and from the
    next one in it on to that one; a pause without any is nobody's. Work that was lost belongs to
    the first interruption before the incarnation that did not have it any more.

    Args:
        spans: of the whole account.
        counts_anew: the script begins to count its steps anew in each epoch.
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
    books.add_returns(found, counts_anew)
    return found


def _pauses(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans of recovery and waiting that lie end to end."""
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
    """Whose a moment is."""

    def __init__(
        self, interruptions: Sequence[Interruption], trained: Sequence[Incarnation]
    ) -> None:
        self._at = [one.at for one in interruptions]
        self._trained = trained
        self._begun = [one.first_step_at or 0.0 for one in trained]

    def who_lost(self, span: Span) -> int:
        """Index of the interruption that the work of a span was lost to."""
        first = bisect_left(self._begun, span.ended - _CLOSE)
        for index in range(first, len(self._trained)):
            one = self._trained[index]
            moment = -math.inf if one.since is None and one.from_step == 0 else one.since
            if moment is None or moment <= span.began + _CLOSE:
                return self._first_behind(self._begun[index - 1] if index else -math.inf)
        return self._first_behind(self._begun[-1] if self._begun else -math.inf)

    def shares(self, pause: Sequence[Span]) -> Iterator[tuple[int, Category, float]]:
        """How a pause is divided: index of the interruption, category, seconds."""
        began, ended = pause[0].began, pause[-1].ended
        first = bisect_left(self._at, began - _CLOSE)
        last = bisect_right(self._at, ended + _CLOSE)
        if first == last:  # nobody ran a job that had finished, or nodes were waited for
            return
        edges = [-math.inf, *self._at[first + 1 : last], math.inf]
        for span in pause:
            low = bisect_right(edges, span.began) - 1
            while low < len(edges) - 1 and edges[low] < span.ended:
                seconds = min(span.ended, edges[low + 1]) - max(span.began, edges[low])
                yield first + low, span.category, max(0.0, seconds)
                low += 1

    def add_returns(self, found: list[Cost], counts_anew: bool) -> None:
        """When each was over, and how many steps it threw back."""
        for index, cost in enumerate(found):
            following = bisect_right(self._begun, self._at[index])
            limit = self._at[index + 1] if index + 1 < len(found) else math.inf
            if following < len(self._begun) and self._begun[following] <= limit:
                cost.back_at = self._begun[following]
            owner = self._first_behind(self._begun[following - 1] if following else -math.inf)
            if owner == index and 0 < following < len(self._trained):
                cost.lost_steps = _steps_between(
                    self._trained[following], self._trained[following - 1], counts_anew
                )

    def _first_behind(self, moment: float) -> int:
        return min(bisect_right(self._at, moment), len(self._at) - 1)


def _steps_between(now: Incarnation, before: Incarnation, counts_anew: bool) -> int | None:
    """Steps that one had finished and the next one begins behind of."""
    if now.from_step is None or before.reached_step is None:
        return None
    if counts_anew and now.from_epoch != before.reached_epoch:
        return None
    return max(0, before.reached_step - now.from_step)
