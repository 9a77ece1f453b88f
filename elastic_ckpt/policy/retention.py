"""Which checkpoints are kept: a pure rule over what there is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from elastic_ckpt.errors import UsageError

_BEST = re.compile(r"0*([1-9][0-9]{0,17}):([^:]+)(?::(min|max))?")


@dataclass(frozen=True)
class Retention:
    """What to keep; a checkpoint goes when no part of this asks for it. The default keeps all.

    Attributes:
        last: the newest so many.
        every: the first one in every span of so many optimizer steps; exactly the multiples,
            where there is a save on each.
        best: so many by ``metric``, as the script reported it before the save.
        metric: its name; ``highest`` says that more is better.
    """

    last: int = 0
    every: int = 0
    best: int = 0
    metric: str = ""
    highest: bool = False

    def __post_init__(self) -> None:
        """Refuse what makes no sense, with ``UsageError``."""
        if min(self.last, self.every, self.best) < 0:
            raise UsageError("retention counts are at least 0")
        if bool(self.best) != bool(self.metric):
            raise UsageError("keeping the best needs a number and the name of a metric")

    def __bool__(self) -> bool:
        """Whether anything may go at all."""
        return bool(self.last or self.every or self.best)


@dataclass(frozen=True)
class Candidate:
    """What the rule looks at; ``usable`` is a checkpoint that a restart could take."""

    name: str
    step: int
    usable: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one checkpoint, and why."""

    name: str
    keep: bool
    why: str


def parse_best(text: str) -> tuple[int, str, bool]:
    """``2:loss`` or ``2:accuracy:max`` as (count, metric, highest).

    Raises:
        UsageError: it is neither.
    """
    found = _BEST.fullmatch(text)
    if found is None:
        raise UsageError(f"{text!r} is not of the form N:METRIC or N:METRIC:max")
    return int(found[1]), found[2], found[3] == "max"


def judge(retention: Retention, candidates: Sequence[Candidate]) -> list[Verdict]:
    """A verdict for each candidate, in their order, newest first.

    What no restart could take is kept: it is somebody else's, or for ``verify --quarantine``.
    """
    usable = [candidate for candidate in candidates if candidate.usable]
    reasons: dict[str, str] = {}
    if not retention:
        reasons = {candidate.name: "nothing says what may go" for candidate in usable}
    for reason, names in (
        ("the newest", [candidate.name for candidate in usable[:1]]),
        (f"one of the last {retention.last}", _last(retention, usable)),
        (f"the first of {retention.every} steps", _every(retention, usable)),
        (f"one of the best {retention.best} by {retention.metric}", _best(retention, usable)),
    ):
        for name in names:
            reasons.setdefault(name, reason)
    return [
        Verdict(candidate.name, False, "no rule keeps it")
        if candidate.usable and candidate.name not in reasons
        else Verdict(candidate.name, True, reasons.get(candidate.name, "not valid, left alone"))
        for candidate in candidates
    ]


def _last(retention: Retention, usable: Sequence[Candidate]) -> list[str]:
    return [candidate.name for candidate in usable[: retention.last]]


def _every(retention: Retention, usable: Sequence[Candidate]) -> list[str]:
    if not retention.every:
        return []
    first: list[str] = []
    last_step, last_span = -1, 0
    for candidate in reversed(usable):
        span = candidate.step // retention.every
        # A script that counts its steps per epoch comes back to spans that were there before.
        begins = span != last_span or candidate.step <= last_step
        if begins and span:
            first.append(candidate.name)
        last_step, last_span = candidate.step, span
    return first


def _best(retention: Retention, usable: Sequence[Candidate]) -> list[str]:
    """The newest first among equals; one without the metric, or with nan, is no candidate."""
    sign = -1.0 if retention.highest else 1.0
    scored = [
        (sign * candidate.metrics[retention.metric], candidate.name)
        for candidate in usable
        if not math.isnan(candidate.metrics.get(retention.metric, math.nan))
    ]
    return [name for _, name in sorted(scored, key=lambda pair: pair[0])[: retention.best]]
