"""Retention: what the rule lets go is deleted, except what must never be.

Never deleted: the newest checkpoint whose every byte was read back and matched, one that is
open, and one that is not valid.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from elastic_ckpt.util.progress import Watch, unwatched
from elastic_ckpt.policy.retention import Candidate, Retention, Verdict, judge
from elastic_ckpt.errors import CheckpointError, DirectoryUnusable
from elastic_ckpt.checkpoint.catalog import CheckpointView, scan, view
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.checkpoint.read_lock import removing
from elastic_ckpt.store.trash import empty_trash, throw_away
from elastic_ckpt.store.verified import is_verified, mark_verified, unmark
from elastic_ckpt.checkpoint.verify import verify_full


@dataclass(frozen=True)
class Pruned:
    """What became of one checkpoint; ``bytes`` is its size.

    Attributes:
        failed: no rule keeps it, and it could not be removed; ``why`` says why.
    """

    path: Path
    step: int
    bytes: int
    keep: bool
    why: str
    failed: bool = False


def prune(
    job: JobDirectory,
    retention: Retention,
    *,
    dry_run: bool = False,
    watch: Watch = unwatched,
) -> list[Pruned]:
    """Apply the rule; safe beside a running job, and against a kill at any moment.

    If nothing was verified in full yet, the newest that passes is, now: a read of its bytes.

    Args:
        dry_run: change nothing.
        watch: shows how far that read is.

    Returns:
        A line for every checkpoint, newest first.
    """
    views = [view(path) for path in scan(job)]
    verdicts = judge(retention, [_candidate(found) for found in views])
    if not all(verdict.keep for verdict in verdicts):
        verdicts = _protect(job, views, verdicts, watch, dry_run)
    pruned: list[Pruned] = []
    for found, verdict in zip(views, verdicts, strict=True):
        size = found.manifest.total_bytes if found.manifest else 0
        result = Pruned(found.path, found.step, size, verdict.keep, verdict.why)
        if not verdict.keep:
            result = _look(result) if dry_run else _remove(job, result)
        pruned.append(result)
    if not dry_run:
        empty_trash(job)
    return pruned


def _candidate(found: CheckpointView) -> Candidate:
    metrics = found.manifest.metrics if found.manifest else {}
    return Candidate(found.path.name, found.step, found.valid, metrics)


def _protect(
    job: JobDirectory,
    views: Sequence[CheckpointView],
    verdicts: Sequence[Verdict],
    watch: Watch,
    dry_run: bool,
) -> list[Verdict]:
    """Keep the newest that was verified in full, whatever the rule says; without one, keep all."""
    newest = _newest_verified(job, views, watch, dry_run)
    if newest is None:
        why = "none could be verified in full, so nothing goes"
        return [replace(verdict, keep=True, why=why) for verdict in verdicts]
    return [
        replace(verdict, keep=True, why="the newest that was verified in full")
        if verdict.name == newest and not verdict.keep
        else verdict
        for verdict in verdicts
    ]


def _newest_verified(
    job: JobDirectory, views: Sequence[CheckpointView], watch: Watch, dry_run: bool
) -> str | None:
    valid = [found for found in views if found.valid and found.manifest is not None]
    for found in valid:
        if found.manifest and is_verified(job, found.path, found.manifest):
            return found.path.name
    for found in valid:
        size = found.manifest.total_bytes if found.manifest else 0
        with contextlib.suppress(CheckpointError, OSError):
            advance = watch(f"verifying {found.path.name}", size)
            manifest = verify_full(found.path, advance)
            if not dry_run:
                mark_verified(job, found.path, manifest)
            return found.path.name
    return None


def _look(one: Pruned) -> Pruned:
    """What would become of it now."""
    with contextlib.suppress(OSError), removing(one.path) as why:
        if why:
            return replace(one, keep=True, why=why)
    return one


def _remove(job: JobDirectory, one: Pruned) -> Pruned:
    """Rename it away, or say why it stays."""
    try:
        with removing(one.path) as why:
            if why:
                return replace(one, keep=True, why=why)
            throw_away(job, one.path)
            unmark(job, one.path)
    except (OSError, DirectoryUnusable) as error:
        if os.path.lexists(one.path):  # else somebody else removed it
            why = f"cannot be removed: {getattr(error, 'strerror', None) or error}"
            return replace(one, keep=True, why=why, failed=True)
    return one
