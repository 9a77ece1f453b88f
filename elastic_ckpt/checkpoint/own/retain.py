"""Which of the script's own checkpoints, and of their copies, are deleted."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.own.seal import OwnSeal, copies_of, forget
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention, RetentionCandidate, judge
from elastic_ckpt.util.files import remove_tree

MIN_KEPT: Final = 2
"""To keep at least: the newest may turn out to be damaged."""


def retain(
    job: JobDirectory, every: Sequence[OwnSeal], retention: Retention, intact: Set[int]
) -> list[Path]:
    """Delete old copies; of what the script keeps itself, only what the user's rule says.

    Args:
        every: the seals of what the script writes, newest first.
        intact: numbers of the seals whose files are as they were sealed.

    Returns:
        The script's checkpoints that were deleted.
    """
    last = max(MIN_KEPT, retention.last)
    copies: dict[str, int] = {}
    for one in (one for one in every if one.copied):
        copies[one.path] = copies.get(one.path, 0) + 1  # a best one is written seldom
        if copies[one.path] > last:
            forget(job, one)
            remove_tree(copies_of(job, one.number))
    if not retention:
        return []
    by_number = sorted(every, key=lambda one: one.number, reverse=True)
    kept = [one for one in by_number if not one.copied]
    verdicts = judge(
        replace(retention, last=last),
        [RetentionCandidate(str(one.number), one.step) for one in kept],
    )
    gone = [
        one for one, verdict in zip(kept, verdicts, strict=True)
        if not verdict.keep and one.number in intact
    ]  # fmt: skip
    for one in gone:
        _delete(job, one)
    return [Path(one.path) for one in gone]


def _delete(job: JobDirectory, one: OwnSeal) -> None:
    forget(job, one)
    if one.is_file:
        Path(one.path).unlink(missing_ok=True)
    else:
        remove_tree(one.path)
