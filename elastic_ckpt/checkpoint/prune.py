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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.ownership.read_lock import removing
from elastic_ckpt.checkpoint.quarantine import original_name
from elastic_ckpt.checkpoint.retainable import KnownCheckpoints, Retainable
from elastic_ckpt.checkpoint.verify import is_marked, mark_verified, marked, unmark, verify_full
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
    known: KnownCheckpoints | None = None,
) -> list[Pruned]:
    """Apply the rule to the checkpoints, and to each superseded line by itself, the oldest last set
    aside first. Safe while the job runs, and if it is killed at any moment.

    If no checkpoint is verified yet, the newest one that passes is verified first, by a full read.

    Args:
        dry_run: change nothing.
        watch: shows the progress of that read.
        superseded: the number of superseded lines to keep, those set aside last; None keeps all.
        known: what earlier passes have seen, so that this one reads only what is new, what it
            deletes, and what makes that safe: the newest, the newest verified one, and the best.

    Returns:
        One entry per checkpoint, newest first; then the superseded ones.
    """
    known = known or KnownCheckpoints()
    for is_last in (False, True):
        newest, lines = known.look(job)
        told = lines[: len(lines) - superseded] if superseded is not None else []
        plans = [_Plan(newest, judge(retention, [*map(_candidate, newest)]))]
        is_safe = not told or _newest_verified(job, newest, watch, dry_run) is not None
        for line in lines:
            if line in told and is_safe:
                gone = [RetentionVerdict(one.path.name, False, "as requested") for one in line]
                plans.append(_Plan(line, gone, requested=True))
            else:
                plans.append(_Plan(line, judge(retention, [*map(_candidate, line)])))
        plans = [_protected(job, plan, watch, dry_run) for plan in plans]
        # The second time all that is known was seen just now.
        if is_last or known.still_true(one for plan in plans for one in plan.relied_upon):
            break
    pruned = [one for plan in plans for one in _carry_out(job, plan, dry_run)]
    if not dry_run:
        empty_trash(job)
    return pruned


@dataclass(frozen=True)
class _Plan:
    """What to do with some checkpoints, newest first. ``support`` is the newest verified one, which
    makes it safe to delete others."""

    found: Sequence[Retainable]
    verdicts: Sequence[RetentionVerdict]
    requested: bool = False
    support: Retainable | None = None

    @property
    def deletes(self) -> bool:
        return not all(verdict.keep for verdict in self.verdicts)

    @property
    def relied_upon(self) -> list[Retainable]:
        """What has to be as it was seen before anything is deleted."""
        if not self.deletes or self.requested:
            return []
        going = [one for one, verdict in self._pairs() if not verdict.keep or verdict.by_metric]
        first = next((one for one in self.found if one.intact), None)
        return list({one.path: one for one in (*going, first, self.support) if one}.values())

    def _pairs(self) -> Iterator[tuple[Retainable, RetentionVerdict]]:
        return zip(self.found, self.verdicts, strict=True)


def _protected(job: JobDirectory, plan: _Plan, watch: Watch, dry_run: bool) -> _Plan:
    """Keep the newest verified checkpoint, whatever the rule; without one, keep all."""
    if plan.requested or not plan.deletes:
        return plan
    newest = _newest_verified(job, plan.found, watch, dry_run)
    if newest is None:
        why = "no checkpoint could be verified: nothing is deleted"
        kept = [replace(verdict, keep=True, why=why) for verdict in plan.verdicts]
        return replace(plan, verdicts=kept)
    verdicts = [
        replace(verdict, keep=True, why="the newest verified one")
        if verdict.name == newest.path.name and not verdict.keep
        else verdict
        for verdict in plan.verdicts
    ]
    return replace(plan, verdicts=verdicts, support=newest)


def _carry_out(job: JobDirectory, plan: _Plan, dry_run: bool) -> list[Pruned]:
    pruned: list[Pruned] = []
    for found, verdict in zip(plan.found, plan.verdicts, strict=True):
        result = Pruned(found.path, found.step, found.bytes, verdict.keep, verdict.why)
        if not verdict.keep:
            result = _look(result) if dry_run else _remove(job, result)
        pruned.append(result)
    return pruned


def _candidate(found: Retainable) -> RetentionCandidate:
    metrics = found.metrics or {}
    return RetentionCandidate(found.path.name, found.step, found.intact, metrics, found.automatic)


def _newest_verified(
    job: JobDirectory, checkpoints: Sequence[Retainable], watch: Watch, dry_run: bool
) -> Retainable | None:
    intact = [found for found in checkpoints if found.intact and found.attempt]
    names = marked(job)
    for found in intact:
        if found.path.name in names and is_marked(job, found.path, found.attempt):
            return found
    for found in intact:
        with contextlib.suppress(CheckpointError, OSError):
            advance = watch(f"verifying {found.path.name}", found.bytes)
            manifest = verify_full(found.path, advance)
            if not dry_run:
                mark_verified(job, found.path, manifest)
            return found
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
        self._known = KnownCheckpoints()
        self._pass = threading.Lock()
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
            # make_room() does not wait for a slow pass; what that one knows is not shared then.
            alone = self._pass.acquire(blocking=False)
            try:
                known = self._known if alone else None
                done = prune(self._job, self.rule, watch=in_lines(self._say), known=known)
            finally:
                if alone:
                    self._pass.release()
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
