"""Retention: deletes the checkpoints that no rule keeps, except those that must never be.

Never deleted: the newest verified checkpoint, one that is open, and one that is not intact.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.catalog import CheckpointView, scan, view
from elastic_ckpt.checkpoint.ownership.read_lock import removing
from elastic_ckpt.checkpoint.quarantine import original_name, rejected
from elastic_ckpt.checkpoint.verify import is_verified, mark_verified, unmark, verify_full
from elastic_ckpt.errors import CheckpointError, DirectoryUnusable
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from elastic_ckpt.journal.events import CheckpointPruned, PruneFailed
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.retention import Retention, RetentionCandidate, RetentionVerdict, judge
from elastic_ckpt.util.files import remove_tree, sync_directory
from elastic_ckpt.util.progress import Watch, in_lines, unwatched


@dataclass(frozen=True)
class Pruned:
    """What pruning did with a checkpoint of ``bytes``. If it ``failed``, no rule keeps it, but it
    could not be removed; ``why`` is the reason."""

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
    superseded: int | None = None,
) -> list[Pruned]:
    """Apply the rule to the checkpoints, and to each superseded line by itself, the oldest last set
    aside first. Safe while the job runs, and if it is killed at any moment.

    If no checkpoint is verified yet, the newest one that passes is verified first, by a full read.

    Args:
        dry_run: change nothing.
        watch: shows the progress of that read.
        superseded: the number of superseded lines to keep, those set aside last; None keeps all.

    Returns:
        One entry per checkpoint, newest first; then the superseded ones.
    """
    views = [view(path) for path in scan(job)]
    pruned = _apply(job, views, judge(retention, [*map(_candidate, views)]), watch, dry_run)
    lines = _superseded_lines(job)
    told = lines[: len(lines) - superseded] if superseded is not None else []
    is_safe = not told or _newest_verified(job, views, watch, dry_run) is not None
    for line in lines:
        views = [view(path) for path in line]
        if line in told and is_safe:
            gone = [RetentionVerdict(one.path.name, False, "as requested") for one in views]
            pruned += _carry_out(job, views, gone, dry_run)
        else:
            verdicts = judge(retention, [*map(_candidate, views)])
            pruned += _apply(job, views, verdicts, watch, dry_run)
    if not dry_run:
        empty_trash(job)
    return pruned


def _superseded_lines(job: JobDirectory) -> list[list[Path]]:
    """Return what was superseded together, newest first; the line that was set aside last ends."""
    lines: dict[str, list[Path]] = {}
    for one in rejected(job, job.superseded):  # in the order of their times
        lines[one.line] = [*lines.pop(one.line, []), Path(one.path)]
    return [
        sorted(line, key=lambda path: checkpoint_key(original_name(path)) or (0, 0), reverse=True)
        for line in lines.values()
    ]


def _apply(
    job: JobDirectory,
    views: Sequence[CheckpointView],
    verdicts: Sequence[RetentionVerdict],
    watch: Watch,
    dry_run: bool,
) -> list[Pruned]:
    if not all(verdict.keep for verdict in verdicts):
        verdicts = _protect(job, views, verdicts, watch, dry_run)
    return _carry_out(job, views, verdicts, dry_run)


def _carry_out(
    job: JobDirectory,
    views: Sequence[CheckpointView],
    verdicts: Sequence[RetentionVerdict],
    dry_run: bool,
) -> list[Pruned]:
    pruned: list[Pruned] = []
    for found, verdict in zip(views, verdicts, strict=True):
        size = found.manifest.total_bytes if found.manifest else 0
        result = Pruned(found.path, found.step, size, verdict.keep, verdict.why)
        if not verdict.keep:
            result = _look(result) if dry_run else _remove(job, result)
        pruned.append(result)
    return pruned


def _candidate(found: CheckpointView) -> RetentionCandidate:
    metrics = found.manifest.metrics if found.manifest else {}
    automatic = found.manifest is not None and found.manifest.automatic
    return RetentionCandidate(found.path.name, found.step, found.intact, metrics, automatic)


def _protect(
    job: JobDirectory,
    views: Sequence[CheckpointView],
    verdicts: Sequence[RetentionVerdict],
    watch: Watch,
    dry_run: bool,
) -> list[RetentionVerdict]:
    """Keep the newest verified checkpoint, whatever the rule; without one, keep all."""
    newest = _newest_verified(job, views, watch, dry_run)
    if newest is None:
        why = "no checkpoint could be verified: nothing is deleted"
        return [replace(verdict, keep=True, why=why) for verdict in verdicts]
    return [
        replace(verdict, keep=True, why="the newest verified one")
        if verdict.name == newest and not verdict.keep
        else verdict
        for verdict in verdicts
    ]


def _newest_verified(
    job: JobDirectory, views: Sequence[CheckpointView], watch: Watch, dry_run: bool
) -> str | None:
    intact = [found for found in views if found.intact and found.manifest is not None]
    for found in intact:
        if found.manifest and is_verified(job, found.path, found.manifest):
            return found.path.name
    for found in intact:
        size = found.manifest.total_bytes if found.manifest else 0
        with contextlib.suppress(CheckpointError, OSError):
            advance = watch(f"verifying {found.path.name}", size)
            manifest = verify_full(found.path, advance)
            if not dry_run:
                mark_verified(job, found.path, manifest)
            return found.path.name
    return None


def _look(one: Pruned) -> Pruned:
    """Return what pruning would do with it now."""
    with contextlib.suppress(OSError), removing(one.path) as why:
        if why:
            return replace(one, keep=True, why=why)
    return one


def _remove(job: JobDirectory, one: Pruned) -> Pruned:
    """Rename it away, or return why it stays."""
    try:
        with removing(one.path) as why:
            if why:
                return replace(one, keep=True, why=why)
            throw_away(job, one.path)
            unmark(job, one.path)
            if one.path.parent == job.superseded:
                one.path.with_name(one.path.name + ".json").unlink(missing_ok=True)
    except (OSError, DirectoryUnusable) as error:
        if os.path.lexists(one.path):  # else another process removed it
            why = f"cannot be removed: {getattr(error, 'strerror', None) or error}"
            return replace(one, keep=True, why=why, failed=True)
    return one


_NAME = re.compile(r"(.+)-[0-9a-f]{8}")


def throw_away(job: JobDirectory, checkpoint: Path) -> Path:
    """Take a checkpoint out of the catalog, durably; its bytes are still there. Raises
    DirectoryUnusable if the trash is a link, OSError if it is gone or cannot be moved."""
    job.require(job.trash)
    target = job.trash / f"{original_name(checkpoint)}-{secrets.token_hex(4)}"
    os.rename(checkpoint, target)
    sync_directory(checkpoint.parent)
    return target


def empty_trash(job: JobDirectory, hurry: Callable[[], bool] = lambda: False) -> None:
    """Delete what is in the trash; what cannot be deleted is left for the next call, and so is the
    rest once ``hurry`` returns True."""
    if not job.owns(job.trash):
        return
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(job.trash)):
            match = _NAME.fullmatch(entry.name)
            if match is None or checkpoint_key(match[1]) is None or hurry():
                continue
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)


_POLL_SECONDS: Final = 0.05
_PATIENCE_SECONDS: Final = 5.0
_FINISH_SECONDS: Final = 600.0


class Retainer:
    """The thread that deletes what no ``rule`` keeps, by default nothing, while training continues.
    The process may end at any moment: what was renamed away is deleted at the next start."""

    def __init__(self, job: JobDirectory, journal: Journal, say: Callable[[str], None]) -> None:
        self.rule = Retention()
        self._job = job
        self._journal = journal
        self._say = say
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()
        self._due = False
        self._works = False

    def after_save(self) -> None:
        """Start a pass; if one is still running, another one follows it."""
        if not self.rule:
            return
        with self._guard:
            self._due = True
            if self._works and self._thread is not None and self._thread.is_alive():
                return
            self._works = True
        self._thread = threading.Thread(target=self._work, name="retention", daemon=True)
        self._thread.start()

    def make_room(self) -> None:
        """Prune now, and return when it is done. Waits only briefly for a running pass: a deadline
        may be near, and two passes do not disturb each other."""
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
        if self.rule:
            self._prune()

    def finish(self, hurry: Callable[[], bool]) -> None:
        """Wait, bounded and until ``hurry`` returns True, for the running pass: no later one would
        do its work."""
        limit = time.monotonic() + _FINISH_SECONDS
        while self._thread is not None and self._thread.is_alive() and not hurry():
            if time.monotonic() > limit:
                self._say(f"deleting old checkpoints takes over {_FINISH_SECONDS:.0f} s: left")
                return
            self._thread.join(_POLL_SECONDS)

    def _work(self) -> None:
        while self._take():
            self._prune()

    def _take(self) -> bool:
        with self._guard:
            self._works, self._due = self._due, False
            return self._works

    def _prune(self) -> None:
        try:
            done = prune(self._job, self.rule, watch=in_lines(self._say))
        except (OSError, RuntimeError) as error:  # RuntimeError: Python ends, and hashing with it
            self._journal.write(PruneFailed(error=str(error)))
            return
        for one in done:
            if one.failed:
                self._journal.write(PruneFailed(path=str(one.path), error=one.why))
            elif not one.keep:
                self._journal.write(
                    CheckpointPruned(path=str(one.path), step=one.step, bytes=one.bytes)
                )
