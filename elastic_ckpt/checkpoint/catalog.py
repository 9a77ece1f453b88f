"""The checkpoints of a job, and which of them a restart may load."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.manifest import Manifest, SealHeader
from elastic_ckpt.checkpoint.memory.generation import SEAL_NAME
from elastic_ckpt.checkpoint.memory.seal import MemorySeal
from elastic_ckpt.checkpoint.memory.tier import MemoryTier, tier_of
from elastic_ckpt.checkpoint.own.seal import OwnSeal, seal_path, seals, where_intact
from elastic_ckpt.checkpoint.ownership.read_lock import BeingRemoved, ReadLock
from elastic_ckpt.checkpoint.quarantine import (
    Rejected,
    is_scripts,
    original_name,
    rejected,
    set_aside,
)
from elastic_ckpt.checkpoint.remote_note import noted_seconds_ago, read_remote
from elastic_ckpt.checkpoint.verify import (
    MANIFEST_NAME,
    is_marked,
    is_verified,
    marked,
    read_manifest,
    read_sealed,
    verify_full,
    verify_quick,
)
from elastic_ckpt.errors import CheckpointError, NotSealed, UnsupportedFormat
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from elastic_ckpt.policy.own_saves import step_of
from elastic_ckpt.util.progress import Advance
from elastic_ckpt.util.text import printable

_FOREIGN: Final = (NotSealed, UnsupportedFormat, BeingRemoved)


@dataclass(frozen=True)
class CheckpointView:
    """One line of ``list``.

    Attributes:
        session: name of its session; empty for the unnamed one.
        manifest: None where it could not be trusted.
        age_seconds: since the seal was written, by the file's time; None if unknown.
        intact: every file was seen to exist with its size, and no damage is known.
        verified: every byte was read and its digest matched, now or at an earlier time.
        why: why it is not intact; else empty.
        own: its seal, if the script wrote it itself.
        url: the job's, if it is in the bucket of several nodes; then nothing is at ``path``.
        checked: whether its files were looked at, rather than its manifest alone.
        foreign: whether it must not be set aside: never sealed, unreadable, or newer.
    """

    path: Path
    epoch: int
    step: int
    manifest: Manifest | MemorySeal | None
    age_seconds: float | None
    intact: bool
    verified: bool
    why: str
    tier: str = "disk"
    foreign: bool = False
    session: str = ""
    own: OwnSeal | None = None
    url: str = ""
    checked: bool = True

    @property
    def seal(self) -> Manifest | MemorySeal | OwnSeal | None:
        """What it was sealed with, if that could be trusted: it has its bytes and its reason."""
        return self.manifest or self.own

    @property
    def age(self) -> tuple[int, int, int]:
        """See ``SealHeader.age``; without a seal the session is not known."""
        return self.seal.age if self.seal else (0, self.epoch, self.step)

    @property
    def is_scripts(self) -> bool:
        """Whether the script wrote it itself."""
        return self.own is not None or (self.tier == "quarantine" and is_scripts(self.path))

    @property
    def title(self) -> str:
        """``step 60``, or the name of what the script wrote itself."""
        if self.own is not None:
            return printable(Path(self.own.path).name)
        return printable(original_name(self.path)) if self.is_scripts else f"step {self.step}"

    @property
    def shown(self) -> str:
        """Its name for people, with that of its session."""
        return JobDirectory(self.path.parent, self.session).shown(self.path)

    @property
    def state(self) -> str:
        """``verified``, ``intact``, ``sealed``, ``share``, or why it is none of these."""
        if self.verified or self.why:
            return self.why or "verified"
        if isinstance(self.seal, MemorySeal) and not self.seal.is_whole:
            return "share"  # other nodes have the rest
        return "intact" if self.checked else "sealed"


def scan(job: JobDirectory) -> list[Path]:
    """Return the directories named like a checkpoint, newest first: by (epoch, step) as numbers."""
    return [path for path, _ in scan_with_inodes(job)]


def scan_with_inodes(job: JobDirectory) -> list[tuple[Path, int]]:
    """Return what :func:`scan` does, each with the directory's inode."""
    found: list[tuple[tuple[int, int], str, int]] = []
    for entry in os.scandir(job.root):
        key = checkpoint_key(entry.name)
        if key is not None and entry.is_dir(follow_symlinks=False):
            found.append((key, entry.path, entry.inode()))
    return [(Path(path), inode) for _, path, inode in sorted(found, reverse=True)]


def view(path: Path, full: Advance | None = None) -> CheckpointView:
    """Verify one checkpoint and describe it; never raises for a bad one. With ``full`` every byte
    is hashed, and counted there; else only sizes are compared."""
    epoch, step = checkpoint_key(path.name) or (0, 0)
    manifest, why, foreign = None, "", False
    try:
        manifest = verify_quick(path) if full is None else _read_in_full(path, full)
        epoch, step = manifest.epoch, manifest.step
    except CheckpointError as error:
        why, foreign = printable(str(error)), isinstance(error, _FOREIGN)
    except OSError as error:
        why, foreign = f"cannot be read: {error.strerror or error}", True
    job = JobDirectory.holding(path.parent)
    verified = manifest is not None and (full is not None or is_verified(job, path, manifest))
    return CheckpointView(
        path, epoch, step, manifest, _age(path), not why, verified, why,
        foreign=foreign, session=job.name,
    )  # fmt: skip


def _listed(job: JobDirectory) -> list[CheckpointView]:
    """Return a session's checkpoints, newest first. The files are looked at down to the first
    intact one, which a restart would load, and of the others the manifest: on a shared file system
    each look takes a way over the network."""
    found: list[CheckpointView] = []
    names = marked(job)
    for path in scan(job):
        is_known = any(one.intact for one in found)
        found.append(_sealed_view(job, path, names) if is_known else view(path))
    return found


def _sealed_view(job: JobDirectory, path: Path, names: Collection[str]) -> CheckpointView:
    try:
        manifest, written = read_sealed(path)
    except (CheckpointError, OSError):
        return view(path)  # which says what is wrong
    verified = path.name in names and is_marked(job, path, manifest.attempt)
    age = max(0.0, time.time() - written)
    return CheckpointView(
        path, manifest.epoch, manifest.step, manifest, age, False, verified, "",
        session=job.name, checked=False,
    )  # fmt: skip


def own_views(job: JobDirectory, most: int | None = None) -> list[CheckpointView]:
    """Return the checkpoints that the script wrote itself, newest first, all or the first few;
    sizes are compared."""
    return [_own_view(job, one) for one in seals(job)[:most]] if not job.name else []


def _newest_own(job: JobDirectory) -> tuple[list[CheckpointView], list[CheckpointView]]:
    """Return the newest intact one that the script wrote itself, if there is one, and newer ones
    that are damaged; what the script has deleted is not."""
    damaged: list[CheckpointView] = []
    for one in seals(job) if not job.name else []:
        found = _own_view(job, one)
        if found.intact:
            return [found], damaged
        if one.copied or os.path.lexists(one.path):
            damaged.append(found)
    return [], damaged


def _newest_remote(job: JobDirectory) -> list[CheckpointView]:
    """Return the newest one in the bucket of several nodes, as its head has noted it."""
    found = read_remote(job) if not job.name else None
    if found is None:
        return []
    url, seal = found
    path, age = job.session(seal.session).checkpoint(seal.epoch, seal.step), noted_seconds_ago(job)
    return [
        CheckpointView(
            path, seal.epoch, seal.step, seal, age, True, False, "", "bucket",
            session=seal.session, url=url,
        )
    ]  # fmt: skip


def _own_view(job: JobDirectory, one: OwnSeal) -> CheckpointView:
    path, why = Path(one.path), ""
    try:
        path = where_intact(job, one)
    except CheckpointError as error:
        why = printable(str(error))
    except OSError as error:
        why = f"cannot be read: {error.strerror or error}"
    age = _seconds_since(seal_path(job, one.number))
    return CheckpointView(path, 0, one.step, None, age, not why, False, why, own=one)


def _read_in_full(path: Path, advance: Advance) -> Manifest:
    read_manifest(path)  # reports a bad manifest, where the lock finds it missing
    lock = ReadLock(path)
    try:
        return verify_full(path, advance)
    finally:
        lock.release()


def in_memory(job: JobDirectory, root: str) -> list[CheckpointView]:
    """Return what this node's memory tier holds and the disk lacks, newest first. ``root`` is the
    tier's directory in a supervisor's record; empty without a tier."""
    tier = tier_of(job, root)
    return [
        CheckpointView(
            one.generation.slot,
            one.seal.epoch,
            one.seal.step,
            one.seal,
            age_seconds=_seconds_since(one.generation.slot / SEAL_NAME),
            intact=True,
            verified=False,
            why="",
            tier="memory",
            session=one.seal.session,
        )
        for one in (tier.sealed() if tier else [])
        if not one.settled and (not job.name or one.seal.session == job.name)
    ]


def list_checkpoints(job: JobDirectory, memory: str = "") -> list[CheckpointView]:
    """Return every checkpoint of all sessions, newest first; then the superseded and the
    quarantined ones. ``memory`` is a tier's root. Files are looked at down to the newest intact
    checkpoint of each session; older ones are sealed, as far as their manifests say."""
    found = [view for one in job.sessions() for view in _listed(one)] + in_memory(job, memory)
    found += own_views(job)
    found.sort(key=lambda one: one.age, reverse=True)
    return found + superseded(job) + quarantined(job)


def newest_and_rejected(
    job: JobDirectory, memory: str = ""
) -> tuple[CheckpointView | None, list[CheckpointView]]:
    """Return the newest intact checkpoint of all sessions, and what a restart would not load.

    The latter are newer ones, and those in quarantine. No older one is read.
    """
    passed_over: list[CheckpointView] = []
    newest: list[CheckpointView] = []
    waiting = in_memory(job, memory)
    for one in job.sessions():
        held = next((held for held in waiting if held.session == one.name), None)
        key = (held.epoch, held.step) if held else (-1, 0)
        for path in scan(one):
            if (checkpoint_key(path.name) or (0, 0)) <= key:
                break
            found = view(path)
            if found.intact:
                held = found
                break
            passed_over.append(found)
        newest += [held] if held else []
    own, damaged = _newest_own(job)
    newest += own + _newest_remote(job)
    passed_over += damaged + quarantined(job)
    return max(newest, key=lambda one: one.age, default=None), passed_over


def quarantined(job: JobDirectory) -> list[CheckpointView]:
    """Return what failed verification in all sessions, newest first."""
    return [_aside(one, entry, "quarantine") for one in job.sessions() for entry in rejected(one)][
        ::-1
    ]


def superseded(job: JobDirectory) -> list[CheckpointView]:
    """Return what the job was continued without, in all sessions, newest first."""
    return [
        _aside(one, entry, "superseded")
        for one in job.sessions()
        for entry in rejected(one, one.superseded)
    ][::-1]


def _aside(job: JobDirectory, entry: Rejected, tier: str) -> CheckpointView:
    path = Path(entry.path)
    name = original_name(path)
    epoch, step = checkpoint_key(name) or (0, step_of(name))
    manifest = None
    if tier == "superseded":
        with contextlib.suppress(CheckpointError, OSError):
            manifest = read_manifest(path)
    return CheckpointView(
        path, epoch, step, manifest, _age(path), False, False, entry.reason, tier, session=job.name
    )


def newest_intact(job: JobDirectory) -> CheckpointView | None:
    """Return a session's newest intact checkpoint on disk; older ones are not read."""
    return next((found for found in map(view, scan(job)) if found.intact), None)


def newest_of_job(job: JobDirectory) -> CheckpointView | None:
    """Return the newest intact checkpoint on disk of the session that was opened last."""
    found = [newest for one in job.sessions() if (newest := newest_intact(one)) is not None]
    found += _newest_own(job)[0] + _newest_remote(job)
    return max(found, key=lambda one: one.age, default=None)


def next_session_order(job: JobDirectory, tier: MemoryTier | None) -> int:
    """Return the ``session_order`` of a session that is opened now: after those of all others."""
    newest = (newest_intact(one) for one in job.session("").sessions())
    seals: list[SealHeader] = [one.manifest for one in newest if one and one.manifest]
    seals += [one.seal for one in tier.sealed()] if tier else []
    own = max((one.session_order for one in seals if one.session == job.name), default=0)
    others = max((one.session_order for one in seals if one.session != job.name), default=-1)
    return max(own, others + 1)


def candidates(job: JobDirectory) -> list[tuple[Path, Manifest | None, CheckpointError | None]]:
    """Return what a restart may try, newest first, down to the first intact one, each with its
    manifest or why it is not intact. UnsupportedFormat if a newer version wrote the newest one: to
    fall back silently would lose work."""
    found: list[tuple[Path, Manifest | None, CheckpointError | None]] = []
    for path in scan(job):
        try:
            manifest = verify_quick(path)
        except UnsupportedFormat as error:
            raise UnsupportedFormat(f"{path.name}: {error}") from None
        except CheckpointError as error:
            found.append((path, None, error))
        else:
            found.append((path, manifest, None))
            break
    return found


def _age(path: Path) -> float | None:
    sealed = _seconds_since(path / MANIFEST_NAME)
    return _seconds_since(path) if sealed is None else sealed


def _seconds_since(path: Path) -> float | None:
    """Return its age; None if it does not exist."""
    try:
        return max(0.0, time.time() - path.lstat().st_mtime)
    except OSError:
        return None


def newest_two_intact(job: JobDirectory) -> tuple[CheckpointView, CheckpointView] | None:
    """Return a session's newest intact checkpoint and the previous one; None without two.

    Raises:
        OSError: the storage does not answer.
    """
    found: list[CheckpointView] = []
    for path in scan(job):
        try:
            verify_quick(path)
        except CheckpointError:
            continue
        found.append(view(path))
        if len(found) == 2:
            return found[0], found[1]
    return None


def fall_back(job: JobDirectory, newest: Path, why: str) -> Path:
    """Move a checkpoint to quarantine, so that no restart loads it, and return where; or
    OSError."""
    return set_aside(job, newest, f"fell back to an older one: {why}")
