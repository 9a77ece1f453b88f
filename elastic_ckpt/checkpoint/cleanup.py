"""What a killed run left is put in order at the next start, by the holder of the job's lock."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.file_digest import digest_bytes
from elastic_ckpt.checkpoint.disk.part import part_name
from elastic_ckpt.checkpoint.manifest import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    PartManifest,
    decode_manifest,
    decode_part,
    encode,
    make_manifest,
)
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.checkpoint.prune import empty_trash
from elastic_ckpt.checkpoint.quarantine import forget_unfinished
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME, read_manifest, verify_files, verify_sizes
from elastic_ckpt.errors import (
    CheckpointError,
    CheckpointRejected,
    RunSuperseded,
    UnsupportedFormat,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import read_bounded, remove_temporaries
from elastic_ckpt.util.progress import Watch, unwatched

_NAME = re.compile(r"(?:([1-9][0-9]{0,11})\.)?(0|[1-9][0-9]{0,17})-([0-9a-f]{16})")
_MAX_RANKS: Final = 1_000_000


class _Interrupted(Exception):  # not an error
    """The rest of the recovery is left to the next start."""


def recover(
    job: JobDirectory,
    hurry: Callable[[], bool] = lambda: False,
    watch: Watch = unwatched,
    spare: str = "",
    fence: Fence | None = None,
) -> list[tuple[Path, str]]:
    """Seal every attempt that is complete and verified; remove the others and all leftovers.

    In all sessions of the job.

    Only the owner of the job may call this, before it launches workers: the only writer of its
    attempts is then the drain of the memory tier. An earlier run that is still alive cannot seal
    what it had begun: the attempt is moved away first, under the name of this run. Calling it again
    changes nothing. An attempt that cannot be read or sealed now (an I/O error, a full disk), or
    that a newer version wrote, is left alone: it is never loaded, and must not stop the job.

    Args:
        hurry: called repeatedly; True leaves the rest to the next start.
        watch: shows progress.
        spare: identity of the attempt that this very process is writing.
        fence: of this run; None if it has no number.

    Returns:
        For each attempt: its path, or that of the checkpoint it became, and what was done.

    Raises:
        RunSuperseded: another run has taken the job over.
    """
    if fence is not None:
        fence.check()
    done: list[tuple[Path, str]] = []
    for one in job.sessions():
        done += _recover(one, hurry, watch, spare, fence)
    return done


def take_over(job: JobDirectory, fence: Fence) -> None:
    """Move the attempts of earlier runs to this run's number, as :func:`recover` does later.

    A run that was suspended just before its rename cannot seal after that: neither what a restore
    does next nor what ranks load can be overtaken by it. What cannot be moved now is left.
    """
    with contextlib.suppress(OSError, RunSuperseded):
        for one in job.sessions():
            for attempt in _attempts(one, fence):
                _taken_over(attempt)


def _attempts(job: JobDirectory, fence: Fence | None) -> list[DiskAttempt]:
    found = []
    if job.owns(job.attempts):
        for entry in sorted(os.scandir(job.attempts), key=lambda entry: entry.name):
            match = _NAME.fullmatch(entry.name)
            if match is not None and entry.is_dir(follow_symlinks=False):
                step, run = int(match[2]), int(match[1] or 0)
                found.append(DiskAttempt(job, match[3], step, run, fence))
    return found


def _recover(
    job: JobDirectory, hurry: Callable[[], bool], watch: Watch, spare: str, fence: Fence | None
) -> list[tuple[Path, str]]:
    for directory in (job.root, job.quarantine):
        remove_temporaries(directory)
    forget_unfinished(job)
    empty_trash(job, hurry)
    done: list[tuple[Path, str]] = []
    for attempt in _attempts(job, fence):
        if attempt.identity == spare:
            continue
        try:
            done.append(_settle(_taken_over(attempt), hurry, watch))
        except _Interrupted:
            break
    return done


def _taken_over(attempt: DiskAttempt) -> DiskAttempt:
    """Move an earlier run's attempt to a name of this run, so that only this one can seal it."""
    if attempt.fence is None or attempt.run == attempt.fence.number:
        return attempt
    attempt.fence.check()
    ours = dataclasses.replace(attempt, run=attempt.fence.number)
    with contextlib.suppress(OSError):  # its owner has just sealed it, or it stays where it is
        os.rename(attempt.path, ours.path)
        return ours
    return attempt


def _settle(attempt: DiskAttempt, hurry: Callable[[], bool], watch: Watch) -> tuple[Path, str]:
    try:
        manifest = _complete(attempt, hurry, watch)
        return attempt.publish(manifest, manifest.files), "sealed"
    except (UnsupportedFormat, OSError) as error:
        return attempt.path, f"left alone: {error}"
    except CheckpointError as error:
        attempt.drop()
        return attempt.path, f"removed: {error}"


def _complete(attempt: DiskAttempt, hurry: Callable[[], bool], watch: Watch) -> Manifest:
    """Return the manifest of an attempt whose parts are all present and verified."""
    for directory in (attempt.path, attempt.path / "parts"):
        remove_temporaries(directory)
    if os.path.lexists(attempt.path / MANIFEST_NAME):
        manifest = read_manifest(attempt.path)
    else:
        manifest = _from_parts(attempt)
    if (manifest.attempt, manifest.step) != (attempt.identity, attempt.step):
        raise CheckpointRejected("its manifest is of another attempt or step")
    verify_sizes(attempt.path, manifest.files)
    watched = watch(f"hashing {attempt.path.name}", manifest.total_bytes)

    def advance(count: int) -> None:
        if hurry():
            raise _Interrupted
        watched(count)

    advance(0)
    verify_files(attempt.path, manifest.files, advance)
    return manifest


def _from_parts(attempt: DiskAttempt) -> Manifest:
    files: list[FileEntry] = []
    if (attempt.path / "parts").is_symlink():
        raise CheckpointRejected("parts is a link")
    first = _read_part(attempt, 0, files)
    if first.header is None:
        raise CheckpointRejected("part 0 has no header")
    if first.header.world_size != first.world_size or first.world_size > _MAX_RANKS:
        raise CheckpointRejected("part 0 contradicts itself about the world size")
    for rank in range(1, first.world_size):
        part = _read_part(attempt, rank, files)
        if part.world_size != first.world_size:
            raise CheckpointRejected(f"part {rank} is of another world size")
        if len(files) > MAX_FILES:
            raise CheckpointRejected(f"its parts list more than {MAX_FILES} files")
    # Each part may be in order and all of them together not be: a file listed by two.
    return decode_manifest(encode(make_manifest(first.header, files)))


def _read_part(attempt: DiskAttempt, rank: int, files: list[FileEntry]) -> PartManifest:
    name = part_name(rank)
    path = attempt.path / name
    if not path.is_file() or path.is_symlink():
        raise CheckpointRejected(f"incomplete: {name} is missing")
    data = read_bounded(path, MAX_MANIFEST_BYTES)
    part = decode_part(data)
    if part.rank != rank or part.attempt != attempt.identity:
        raise CheckpointRejected(f"{name} belongs to another rank or attempt")
    if any(entry.rank != rank for entry in part.files):
        raise CheckpointRejected(f"{name} lists a file of another rank")
    files.extend([*part.files, digest_bytes(data).entry(name, rank)])
    return part
