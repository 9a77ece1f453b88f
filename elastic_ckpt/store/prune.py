"""Retention: what the rule lets go is deleted, except what must never be.

Never deleted: the newest checkpoint whose every byte was read back and matched, one that is
open, and one that is not valid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from elastic_ckpt.core.progress import Watch, unwatched
from elastic_ckpt.core.retention import Candidate, Retention, Verdict, judge
from elastic_ckpt.errors import CheckpointError, DirectoryUnusable
from elastic_ckpt.store.catalog import CheckpointView, scan, view
from elastic_ckpt.store.layout import JobDirectory
from elastic_ckpt.store.reading import removing
from elastic_ckpt.store.trash import empty_trash, throw_away
from elastic_ckpt.store.verified import is_verified, mark_verified, unmark
from elastic_ckpt.store.verify import verify_full


@dataclass(frozen=True)
class Pruned:
    """What became of one checkpoint; ``bytes`` is its size."""

    path: Path
    step: int
    bytes: int
    keep: bool
    why: str


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
        dry_run: delete nothing.
        watch: shows how far that read is.

    Returns:
        A line for every checkpoint, newest first.
    """
    views = [view(path) for path in scan(job)]
    verdicts = judge(retention, [_candidate(found) for found in views])
    if not all(verdict.keep for verdict in verdicts):
        verdicts = _protect(job, views, verdicts, watch)
    pruned: list[Pruned] = []
    for found, verdict in zip(views, verdicts, strict=True):
        why = verdict.why
        keep = verdict.keep
        if not keep and not dry_run:
            kept_because = _remove(job, found.path)
            keep, why = bool(kept_because), kept_because or why
        size = found.manifest.total_bytes if found.manifest else 0
        pruned.append(Pruned(found.path, found.step, size, keep, why))
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
) -> list[Verdict]:
    """Keep the newest that was verified in full, whatever the rule says; without one, keep all."""
    newest = _newest_verified(job, views, watch)
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
    job: JobDirectory, views: Sequence[CheckpointView], watch: Watch
) -> str | None:
    valid = [found for found in views if found.valid and found.manifest is not None]
    for found in valid:
        if found.manifest and is_verified(job, found.path, found.manifest):
            return found.path.name
    for found in valid:
        size = found.manifest.total_bytes if found.manifest else 0
        with contextlib.suppress(CheckpointError, OSError):
            advance = watch(f"verifying {found.path.name}", size)
            mark_verified(job, found.path, verify_full(found.path, advance))
            return found.path.name
    return None


def _remove(job: JobDirectory, checkpoint: Path) -> str:
    """Empty if it is gone now, else why it stays."""
    try:
        with removing(checkpoint) as why:
            if not why:
                throw_away(job, checkpoint)
                unmark(job, checkpoint)
            return why
    except FileNotFoundError:
        return ""  # somebody else removed it
    except (OSError, DirectoryUnusable) as error:
        return f"cannot be removed: {getattr(error, 'strerror', None) or error}"
