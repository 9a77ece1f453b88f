"""Seals the checkpoints that the script writes, sets torn ones aside, and puts copies back.

While the script runs, :meth:`OwnKeeper.look` seals what has become complete. Between two launches
nothing writes, and :meth:`OwnKeeper.prepare` decides about every file: it is sealed and matches, it
is complete and is sealed now, or it is set aside, where the script does not search.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from elastic_ckpt.checkpoint.archive import is_archive
from elastic_ckpt.checkpoint.memory.room import is_memory
from elastic_ckpt.checkpoint.own import seal as own_seal
from elastic_ckpt.checkpoint.own.aside import set_own_aside
from elastic_ckpt.checkpoint.own.copy import copy_files, put_back
from elastic_ckpt.checkpoint.own.files import (
    Found,
    changed_at,
    check_archives,
    find,
    glance,
    matches,
    oldest_first,
    stamps_of,
)
from elastic_ckpt.checkpoint.own.mistakes import Mistakes, require_marker
from elastic_ckpt.checkpoint.own.reports import Reports
from elastic_ckpt.checkpoint.own.retain import retain
from elastic_ckpt.checkpoint.own.seal import (
    OwnSeal,
    copies_of,
    forget,
    newer,
    seals,
    sort_anew,
    verify,
    write,
)
from elastic_ckpt.checkpoint.own.watched import note_watched, watched_before
from elastic_ckpt.errors import CheckpointError, CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.own_saves import (
    CompleteWhen,
    FileStamps,
    Growth,
    OwnSaves,
    is_being_overwritten,
    is_complete,
    may_be_complete,
    step_of,
    why_torn,
)
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.files import remove_tree
from elastic_ckpt.util.progress import ignore

log = logging.getLogger(__name__)


class Hurried(Exception):
    """No error: the rest is left to the next start."""


@dataclass(frozen=True)
class _Known:
    """A sealed checkpoint as it was seen when it was sealed."""

    seal: OwnSeal
    stamps: FileStamps
    glance: tuple[object, ...]


class OwnKeeper:
    """The script's own checkpoints of one job; for one thread at a time.

    Attributes:
        rules: what to watch; may be replaced between two calls.
        newest: the newest seal; None without one.
        mistakes: what looks wrong in the rules.
        since_mark: whether one was sealed that was begun after :meth:`mark`.
    """

    def __init__(
        self,
        job: JobDirectory,
        rules: OwnSaves,
        base: Path,
        run: int,
        retention: Retention,
        reports: Reports,
    ) -> None:
        """``base`` is what relative patterns start from; ``run`` is this run's number."""
        self._job, self.rules, self._base, self._run = job, rules, base, run
        self._retention, self._reports = retention, reports
        self._known: dict[Path, _Known] = {}
        self._growing: dict[Path, Growth] = {}
        self._marked: dict[Path, FileStamps] = {}
        self._mark: float | None = None
        self._replaced: set[Path] = set()
        self.mistakes = Mistakes(base, reports.say)
        self._sealed_at: dict[Path, int] = {}
        self.incarnation = 0
        self.newest: OwnSeal | None = next(iter(self._seals()), None)
        self._number = max((one.number for one in seals(job)), default=0)  # of any pattern
        self.newest_marked = self.newest
        self.since_mark = False

    def _seals(self) -> list[OwnSeal]:
        """Return the seals of what the patterns match, newest first: a hostile one may name any
        path, and what is set aside, put back or deleted must be the script's."""
        every = seals(self._job)
        return [one for one in every if matches(self.rules.watch, self._base, Path(one.path))]

    # -- while the script runs -------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Seal what is complete at monotonic ``now``; say what looks like a mistake, once."""
        self._forget_deleted()
        every = list(find(self.rules.watch, self._base))
        for found, stamps in oldest_first(one for one in every if not self._is_as_sealed(one)):
            growth = self._growing.setdefault(found.path, Growth(stamps, now, now))
            if growth.stamps != stamps:
                growth.stamps, growth.since = stamps, now
            proves_it = found.is_file and is_archive(found.path)
            known = self._known.get(found.path)
            if known and is_being_overwritten(self.rules.complete, known.stamps, stamps):
                continue
            if is_complete(self._rule(found), growth, now, is_archive=proves_it):
                self._try_to_seal(found, stamps, growth.begun)
            else:
                self.mistakes.incomplete(self.rules, found, growth, now)
        self.mistakes.looked(self.rules, every, self._growing, self.newest, now)

    def _is_second(self, path: Path) -> bool:
        return self.rules.names_newest and not matches(self.rules.watch[:1], self._base, path)

    def _rule(self, found: Found) -> CompleteWhen:
        return self.rules.complete.of(is_file=found.is_file)

    def mark(self, now: float, came: float = math.inf) -> None:
        """Tell what was complete at a notice, which ``came`` at this wall time, from what is saved
        because of it: a small job may have saved before this is called."""
        before = self.newest
        self.look(now)
        newest = self.newest
        self._mark, came_ns = now, came * 1e9
        all_stamps = ((path, growth.stamps) for path, growth in self._growing.items())
        self._marked = {path: one for path, one in all_stamps if changed_at(one) <= came_ns}
        self.newest_marked = before if newest and newest.changed > came_ns else newest

    def _is_as_sealed(self, found: Found) -> bool:
        known, newest = self._known.get(found.path), self.newest
        if known is None or known.glance != glance(found.path, self.rules.complete.marker):
            return False
        is_newest = newest is not None and known.seal.number == newest.number
        return not is_newest or known.stamps == stamps_of(found.path)

    def _forget_deleted(self) -> None:
        """Forget what the script has deleted itself, as most keep only the newest few."""
        for path, known in list(self._known.items()):
            if not known.seal.copied and not os.path.lexists(path):
                del self._known[path]
                forget(self._job, known.seal)
                if self.newest is not None and self.newest.number == known.seal.number:
                    self.newest = next(iter(self._seals()), None)

    # -- sealing ---------------------------------------------------------------------------------

    def _try_to_seal(self, found: Found, stamps: FileStamps, begun: float) -> bool:
        """Seal a checkpoint unless it changes meanwhile, is torn, or the disk refuses."""
        try:
            if not self._rule(found).marker:
                check_archives(found, stamps)
            sealed = self._seal(found, stamps)
        except CheckpointRejected as error:
            log.info("%s is not complete: %s", found.path, error)
        except OSError as error:
            log.warning("%s could not be sealed: %s", found.path, error)
        else:
            if sealed is not None:
                self._growing.pop(found.path, None)
                self._note(found, sealed, stamps, begun)
                return True
        growth = self._growing.get(found.path)
        if growth is not None:
            growth.since = max(growth.since, begun)
            growth.stamps = ()  # it is waited for anew
        return False

    def _seal(self, found: Found, stamps: FileStamps) -> OwnSeal | None:
        """Return the seal, which is written; None if the files changed meanwhile. What the script
        overwrites, or keeps in memory, is copied into the job directory."""
        self._number = number = self._number + 1
        about: dict[str, Any] = {"number": number, "step": step_of(found.path.name)}
        about |= {"run": self._run, "second": self._is_second(found.path)}
        volatile = is_memory(found.path) and not is_memory(self._job.root)
        if not found.overwritten and not volatile:
            made = own_seal.seal(found.path, stamps, **about, incarnation=self.incarnation)
            if stamps_of(found.path) != stamps:
                return None
            write(self._job, made)
            return made
        self._job.require(self._job.own_copies)
        copy = copies_of(self._job, number)
        remove_tree(copy)  # of a seal that was not finished
        root = found.path.parent if found.is_file else found.path
        copy_files(root, [name for name, *_ in stamps], copy, link=found.path in self._replaced)
        if stamps_of(found.path) != stamps:
            remove_tree(copy)
            return None
        inside = copy / found.path.name if found.is_file else copy
        made = own_seal.seal(inside, stamps, **about, incarnation=self.incarnation)
        made = msgspec.structs.replace(made, path=str(found.path), copied=True)
        write(self._job, made)
        return made

    def _note(self, found: Found, sealed: OwnSeal, stamps: FileStamps, begun: float) -> None:
        path = found.path
        before = self._known.get(path)
        if before is not None and found.is_file and stamps[0][3] != before.stamps[0][3]:
            self._replaced.add(path)  # the script renames a new file over the old one
        for one in self._seals():
            if one.path == sealed.path and one.number < sealed.number and not one.copied:
                forget(self._job, one)  # it was written again
        self._known[path] = _Known(sealed, stamps, glance(path, self.rules.complete.marker))
        self.newest = newer(self.newest, sealed)
        if self._marked.pop(path, None) == stamps:
            self.newest_marked = newer(self.newest_marked, sealed)
        elif self._mark is not None and begun > self._mark:
            self.since_mark = self.since_mark or self.newest is sealed
        self._reports.sealed(sealed)
        numbers = {known.seal.number for known in self._known.values()}
        for deleted in retain(self._job, self._seals(), self._retention, numbers):
            self._known.pop(deleted, None)

    # -- between two launches --------------------------------------------------------------------

    def settle(self, *, left_well: bool) -> None:
        """Seal what is complete now that no process writes any more.

        Args:
            left_well: the script ended with code 0, by itself.
        """
        every = list(find(self.rules.watch, self._base))
        for found, stamps in oldest_first(one for one in every if not self._is_as_sealed(one)):
            self._settle(found, stamps, left_well=left_well)
        if self.rules and (left_well or self._mark is not None):  # a crash may have come early
            self.mistakes.ended(self.rules, every, self._known)

    def _settle(
        self, found: Found, stamps: FileStamps, *, left_well: bool, rebooted: bool = False
    ) -> bool:
        growth = self._growing.get(found.path)
        proves_it = found.is_file and is_archive(found.path, with_checksums=rebooted)
        whole = may_be_complete(
            self._rule(found), stamps, is_archive=proves_it, left_well=left_well,
            sealed_at=self._sealed_at.get(found.path, 0), rebooted=rebooted,
        )  # fmt: skip
        begun = growth.begun if growth else self._mark or 0.0
        return whole and self._try_to_seal(found, stamps, begun)

    def prepare(self, hurry: Callable[[], bool]) -> str:
        """Verify the newest checkpoint, and set aside what no restart may load; return its path,
        empty without one.

        Called before each launch, while no worker runs. Stops early if ``hurry`` returns True.
        """
        self._growing.clear()
        before = watched_before(self._job)
        self._sort_seals(rebooted=before.rebooted)
        self.mistakes.elsewhere(seals(self._job), self._seals())
        patterns = {one: str(self._base / Path(one).expanduser()) for one in self.rules.watch}
        new = {place for place in patterns.values() if place not in before.patterns}
        taken_over = {found.path for found in find(new, self._base)} - set(self._sealed_at)
        torn = []
        for found, stamps in oldest_first(find(patterns, self._base)):
            if hurry():
                return ""
            if found.path in self._known:
                continue
            is_new, rebooted = found.path in taken_over, before.rebooted
            if not self._settle(found, stamps, left_well=is_new, rebooted=rebooted):
                torn.append((found, stamps))
        require_marker(self.rules, torn, self._seals())
        for found, _ in torn:
            was_sealed = found.path in self._sealed_at
            why = why_torn(self._rule(found), was_sealed=was_sealed, rebooted=before.rebooted)
            self._set_aside(found.path, why)
        note_watched(self._job, patterns.values())
        try:
            return self._choose(hurry)
        except Hurried:
            return ""

    def _sort_seals(self, *, rebooted: bool) -> None:
        """Learn which files are as a seal says; after a reboot, as their newest one says."""
        self._known.clear()
        every = sort_anew(self._job, self._seals(), self._is_second)
        self._sealed_at = {Path(one.path): one.changed for one in reversed(every)}
        lost: set[Path] = set()
        for one in every:
            path = Path(one.path)
            if path in self._known or path in lost:
                continue
            stamps = stamps_of(path)
            try:
                as_before = changed_at(stamps) == one.changed and not (rebooted and one.copied)
                verify(one, None if as_before else ignore)
            except (CheckpointError, OSError):
                if not one.copied and not os.path.lexists(path):
                    forget(self._job, one)  # the script has deleted it
                elif rebooted:
                    lost.add(path)
            else:
                self._known[path] = _Known(one, stamps, glance(path, self.rules.complete.marker))
        self.newest = next(iter(self._seals()), None)

    def _choose(self, hurry: Callable[[], bool]) -> str:
        """Return the newest checkpoint whose every byte is as it was sealed. Of every other path
        that the script overwrites, the newest copy is put back if the path is torn or missing."""
        newest: OwnSeal | None = None
        for one in self._seals():
            path = Path(one.path)
            if newest is not None and (not one.copied or path in self._known):
                continue
            try:
                self._verify(one, hurry)
            except FileNotFoundError:
                forget(self._job, one)
            except CheckpointError as error:
                self._reject(one, str(error))
            else:
                newest = newest or one
                self._known.setdefault(
                    path, _Known(one, stamps_of(path), glance(path, self.rules.complete.marker))
                )
        self.newest = self.newest_marked = newest
        return newest.path if newest else ""

    def _verify(self, one: OwnSeal, hurry: Callable[[], bool]) -> None:
        """Read a checkpoint where the script will; put its copy there if it is another one."""
        watched = self._reports.watch(f"verifying {Path(one.path).name}", one.total_bytes)

        def advance(count: int) -> None:
            if hurry():
                raise Hurried
            watched(count)

        try:
            verify(one, advance)
            return
        except (CheckpointError, FileNotFoundError):
            if not one.copied:
                raise
        copy, path = copies_of(self._job, one.number), Path(one.path)
        verify(one, advance, copy)
        if os.path.lexists(path):
            self._set_aside(path, "it does not match its seal; the copy is put back")
        put_back(copy, path, [entry.path for entry in one.files], is_file=one.is_file)
        self._known[path] = _Known(one, stamps_of(path), glance(path, self.rules.complete.marker))

    def _reject(self, one: OwnSeal, why: str) -> None:
        path, copy = Path(one.path), copies_of(self._job, one.number)
        known, is_it = self._known.get(path), not one.copied
        if known is not None:  # what the script has written over it since is another one
            is_it = known.seal.number == one.number and (is_it or known.stamps == stamps_of(path))
        if is_it and os.path.lexists(path):
            self._set_aside(path, why)
            remove_tree(copy)
        elif one.copied and copy.exists():
            self._set_aside(copy, why, path.name)
        forget(self._job, one)

    def _set_aside(self, path: Path, why: str, name: str = "") -> None:
        target = set_own_aside(self._job, path, why, name or path.name)
        self._known.pop(path, None)
        self._reports.aside(path, target, why)

    def fall_back(self, why: str) -> OwnSeal | None:
        """Set the newest checkpoint aside; return it, None without an older one."""
        every = self._seals()
        if len(every) < 2:
            return None
        self._reject(every[0], why)
        self.newest = every[1]
        return every[0]
