"""Which checkpoints to keep."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from elastic_ckpt.errors import UsageError

_BEST = re.compile(r"0*([1-9][0-9]{0,17}):([^:]+)(?::(min|max))?")


@dataclass(frozen=True)
class Retention:
    """The checkpoints to keep; one that no field selects may be deleted. The default keeps all.

    Attributes:
        last: number of the newest to keep.
        every: keep the first checkpoint in every span of this many optimizer steps: exactly the
            multiples if there is a save on each.
        best: number to keep by ``metric``, as the script reported it before the save.
        metric: name of the metric; lower is better unless ``highest``.
        automatic: number of the newest to keep, where only those that were saved automatically,
            without an interval of the user's, may be deleted.
    """

    last: int = 0
    every: int = 0
    best: int = 0
    metric: str = ""
    highest: bool = False
    automatic: int = 0

    def __post_init__(self) -> None:
        """Raise ``UsageError`` if the fields contradict each other."""
        if min(self.last, self.every, self.best, self.automatic) < 0:
            raise UsageError("retention counts must be at least 0")
        if bool(self.best) != bool(self.metric):
            raise UsageError("keeping the best checkpoints needs both a count and a metric")

    def __bool__(self) -> bool:
        """Whether any checkpoint may be deleted at all."""
        return bool(self.last or self.every or self.best or self.automatic)


@dataclass(frozen=True)
class RetentionCandidate:
    """A checkpoint to decide about; ``usable`` if a restart could use it."""

    name: str
    step: int
    usable: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)
    automatic: bool = False


@dataclass(frozen=True)
class RetentionVerdict:
    """Whether to keep a checkpoint, and why; ``by_metric`` if it is one of the best, so that what
    is not goes because of it."""

    name: str
    keep: bool
    why: str
    by_metric: bool = False


def parse_best(text: str) -> tuple[int, str, bool]:
    """Parse ``2:loss`` or ``2:accuracy:max`` into (count, metric, highest).

    Raises:
        UsageError: the text has neither form.
    """
    found = _BEST.fullmatch(text)
    if found is None:
        raise UsageError(f"--keep-best {text!r} does not have the form N:METRIC or N:METRIC:max")
    return int(found[1]), found[2], found[3] == "max"


def judge(retention: Retention, candidates: Sequence[RetentionCandidate]) -> list[RetentionVerdict]:
    """Return a verdict for each candidate, in their order, which is newest first.

    Candidates that are not usable are kept: they are not ours, or ``verify --quarantine`` decides.
    """
    usable = [candidate for candidate in candidates if candidate.usable]
    reasons: dict[str, str] = {}
    if not retention:
        reasons = {candidate.name: "no retention is set" for candidate in usable}
    chosen = [candidate.name for candidate in usable if not candidate.automatic]
    best = _best(retention, usable)
    for reason, names in (
        ("the newest", [candidate.name for candidate in usable[:1]]),
        ("not saved automatically", chosen if retention.automatic else []),
        (f"one of the last {retention.automatic}", _names(usable[: retention.automatic])),
        (f"one of the last {retention.last}", _names(usable[: retention.last])),
        (f"the first of {retention.every} steps", _every(retention, usable)),
        (f"one of the best {retention.best} by {retention.metric}", best),
    ):
        for name in names:
            reasons.setdefault(name, reason)
    return [
        RetentionVerdict(candidate.name, False, "no rule keeps it")
        if candidate.usable and candidate.name not in reasons
        else RetentionVerdict(
            candidate.name,
            True,
            reasons.get(candidate.name, "not intact: left alone"),
            by_metric=candidate.name in best,
        )
        for candidate in candidates
    ]


def _names(candidates: Sequence[RetentionCandidate]) -> list[str]:
    return [candidate.name for candidate in candidates]


def _every(retention: Retention, usable: Sequence[RetentionCandidate]) -> list[str]:
    if not retention.every:
        return []
    first: list[str] = []
    last_step, last_span = -1, 0
    for candidate in reversed(usable):
        span = candidate.step // retention.every
        # A script that counts its steps per epoch returns to earlier spans.
        is_first = span != last_span or candidate.step <= last_step
        if is_first and span:
            first.append(candidate.name)
        last_step, last_span = candidate.step, span
    return first


def _best(retention: Retention, usable: Sequence[RetentionCandidate]) -> list[str]:
    """Return the best by the metric, newest first among equals; nan or no metric never counts."""
    sign = -1.0 if retention.highest else 1.0
    scored = [
        (sign * candidate.metrics[retention.metric], candidate.name)
        for candidate in usable
        if not math.isnan(candidate.metrics.get(retention.metric, math.nan))
    ]
    return [name for _, name in sorted(scored, key=lambda pair: pair[0])[: retention.best]]
