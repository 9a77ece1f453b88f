"""Which checkpoints a job continues from, and what becomes of the others.

A checkpoint names the run that sealed it and its parent, the attempt that its run continued from.
Continuing from an older one moves those after it to ``.superseded/``, where people find them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
from collections.abc import Iterator
from pathlib import Path

from elastic_ckpt.checkpoint.catalog import newest_intact, scan
from elastic_ckpt.checkpoint.manifest import Manifest, SealHeader
from elastic_ckpt.checkpoint.own.seal import seals
from elastic_ckpt.checkpoint.ownership.fence import Fence, Ownership
from elastic_ckpt.checkpoint.ownership.read_lock import BeingRemoved, ReadLock, removing
from elastic_ckpt.checkpoint.prune import empty_trash, throw_away
from elastic_ckpt.checkpoint.quarantine import Rejected, original_name, rejected, set_aside
from elastic_ckpt.checkpoint.verify import read_manifest, unmark, verify_sizes
from elastic_ckpt.errors import CheckpointError, CheckpointRejected, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key, is_session_name
from elastic_ckpt.util.files import sync_directory


def is_stale(job: JobDirectory, header: SealHeader, fence: Fence) -> bool:
    """Return whether what an earlier run left, in memory or unsealed, is off the job's line.

    It is if a later run has sealed a checkpoint, or a still earlier one has a newer checkpoint.
    """
    if header.run >= fence.number or header.run < fence.rewound:
        return header.run < fence.number
    newest = newest_intact(job)
    there = newest.manifest if newest is not None else None
    if there is None or there.run == header.run:
        return False
    return there.run > header.run or (there.epoch, there.step) > (header.epoch, header.step)


def is_later(there: SealHeader, other: SealHeader) -> bool:
    """Return whether a checkpoint was sealed by a later run or incarnation than another one."""
    return (there.run, there.incarnation) > (other.run, other.incarnation)


def has_same_state(one: Manifest, other: Manifest) -> bool:
    """Return whether two checkpoints have the same files; part manifests name their attempt."""

    def content(manifest: Manifest) -> set[tuple[str, str]]:
        files = manifest.files
        return {(one.path, one.xxh3_128) for one in files if not one.path.startswith("parts/")}

    return content(one) == content(other)


def replace_by(job: JobDirectory, checkpoint: Path, there: Manifest, other: Manifest) -> None:
    """Make room for another checkpoint of the same name: supersede the one that is there.

    One that the same incarnation saved earlier is deleted, unless it is being read: the script has
    saved this step again.

    Raises:
        OSError: it cannot be moved.
    """
    if (there.run, there.incarnation) == (other.run, other.incarnation):
        with removing(checkpoint) as why:
            if not why:
                throw_away(job, checkpoint)
                empty_trash(job)
                return
    line = f"{there.run}.{there.incarnation} by {other.run}.{other.incarnation}"
    supersede(job, checkpoint, f"step {other.step} was saved again by run {other.run}", line=line)


def supersede(
    job: JobDirectory, checkpoint: Path, why: str, name: str = "", line: str = ""
) -> Path:
    """Move a checkpoint, or the attempt that holds it, to the superseded ones; return where it is.

    Those of the same ``line`` were continued one from another; retention keeps the newest of each.

    Raises:
        DirectoryUnusable: a link stands in their place.
        OSError: it cannot be moved.
    """
    return set_aside(job, checkpoint, why, job.superseded, name, line)


def supersede_newer(
    job: JobDirectory, key: tuple[int, int], why: str, line: str = ""
) -> list[Path]:
    """Supersede all checkpoints after (epoch, step), the newest first; return where they are.

    Raises:
        OSError: one cannot be moved; those before it are.
    """
    line = line or secrets.token_hex(8)
    newer = [path for path in scan(job) if (checkpoint_key(path.name) or key) > key]
    return [supersede(job, path, why, line=line) for path in newer]


def superseded(job: JobDirectory) -> list[Rejected]:
    """Return what was superseded, oldest first."""
    return rejected(job, job.superseded)


def continue_from(job: JobDirectory, name: str, ownership: Ownership) -> str:
    """Take the job back to a checkpoint, once: a requeued run with the same ``--from`` continues.

    Returns:
        What was done, for people.

    Raises:
        UsageError, CheckpointError, OSError: as :func:`restore`, and it must be intact.
    """
    one, place, _ = _find(job, name)
    attempt = read_manifest(place).attempt
    if attempt in ownership.record.continued_from:
        return (
            f"the job has gone back to {name} before, and continues from its newest checkpoint; "
            f"elastic-ckpt restore {job.root} {name} takes it back again"
        )
    there, moved = restore(job, name, f"run --from {name}")
    ownership.rewind(attempt)
    aside = f", {len(moved)} newer ones are in {one.superseded}" if moved else ""
    return f"continuing from {one.shown(there)}{aside}"


def restore(job: JobDirectory, name: str, why: str) -> tuple[Path, list[Path]]:
    """Make a checkpoint the newest of its job again, with its own ancestors before it.

    What is newer, or of another branch, is superseded; ancestors that were are put back, so that a
    job that has to fall back stays on this branch. For the holder of the job's lock; pruning at the
    same time leaves the checkpoint alone. A kill at any moment leaves every checkpoint in one place
    or the other; a repeat finishes the work.

    Args:
        name: ``epoch-N_step-M``; of several superseded ones of that name, the directory's. With
            ``SESSION/`` before it, of that session.

    Returns:
        The checkpoint, and what was superseded.

    Raises:
        UsageError: there is none of that name, or several.
        CheckpointError: it is not intact, or is being deleted.
        OSError: one cannot be moved.
    """
    job, source, key = _find(job, name)
    there = job.checkpoint(*key)
    with _kept(job, source):
        manifest = read_manifest(source)
        verify_sizes(source, manifest.files)
        if manifest.checkpoint_name != there.name:
            raise CheckpointRejected(f"{source} holds {manifest.checkpoint_name}")
        line = secrets.token_hex(8)
        moved = supersede_newer(job, key, why, line)
        moved += straighten(job, manifest, why, line)
        if source != there:
            moved += _put_back(job, source, why, line)
    return there, moved


@contextlib.contextmanager
def _kept(job: JobDirectory, checkpoint: Path) -> Iterator[None]:
    """Keep a checkpoint from being pruned; one that just goes is a CheckpointRejected."""
    try:
        lock = ReadLock(checkpoint)
    except BeingRemoved as error:
        if checkpoint.is_dir():
            read_manifest(checkpoint)  # another reason: it is not sealed
        raise CheckpointRejected(
            f"{checkpoint.name} is being deleted, by retention or by elastic-ckpt prune: "
            f"elastic-ckpt list {job.root} shows what is left"
        ) from error
    try:
        yield
    finally:
        lock.release()


def straighten(job: JobDirectory, newest: Manifest, why: str, line: str = "") -> list[Path]:
    """Have the checkpoints before one be its ancestors; return what was superseded for that.

    Ancestors that were superseded are put back. As far as manifests name each other.

    Raises:
        OSError: one cannot be moved.
    """
    line = line or secrets.token_hex(8)
    back, other = _branch(job, newest)
    moved = [supersede(job, path, why, line=line) for path in other if os.path.lexists(path)]
    for path in back:
        with contextlib.suppress(FileNotFoundError):  # it was pruned meanwhile
            moved += _put_back(job, path, why, line)
    return moved


def _put_back(job: JobDirectory, path: Path, why: str, line: str) -> list[Path]:
    """Put a superseded checkpoint into its place; return what was there."""
    place = job.root / original_name(path)
    moved = [supersede(job, place, why, line=line)] if os.path.lexists(place) else []
    os.rename(path, place)
    unmark(job, path)
    with contextlib.suppress(OSError):
        path.with_name(path.name + ".json").unlink()
    sync_directory(job.root)
    sync_directory(job.superseded)
    return moved


def _branch(job: JobDirectory, newest: Manifest) -> tuple[list[Path], list[Path]]:
    """Return a checkpoint's superseded ancestors, and what is in place and of another branch.

    Ancestors are known by the parents that manifests name, as far as they are still there.
    """
    known: dict[str, tuple[Path, Manifest]] = {}
    for path in [*(Path(one.path) for one in superseded(job)), *scan(job)]:
        with contextlib.suppress(CheckpointError, OSError):
            manifest = read_manifest(path)
            known[manifest.attempt] = path, manifest
    line, oldest = {newest.attempt}, newest
    while oldest.parent in known and oldest.parent not in line:
        line.add(oldest.parent)
        oldest = known[oldest.parent][1]
    back, other = [], []
    for attempt, (path, manifest) in known.items():
        key = (manifest.epoch, manifest.step)
        is_aside = path.parent == job.superseded
        if is_aside and attempt in line and attempt != newest.attempt:
            back.append(path)
        elif not is_aside and attempt not in line and key < (newest.epoch, newest.step):
            is_between = key > (oldest.epoch, oldest.step)
            other += [path] if is_between or manifest.run > newest.run else []
    return back, other


def _find(job: JobDirectory, name: str) -> tuple[JobDirectory, Path, tuple[int, int]]:
    """Return the session of a checkpoint, where it is, and its (epoch, step)."""
    session, slash, tail = name.rpartition("/")
    if slash and is_session_name(session) and job.owns(job.session(session).root):
        job, name = job.session(session), tail
    key = checkpoint_key(name)
    if key is not None and (job.root / name).is_dir():
        return job, job.root / name, key
    found = [Path(one.path) for one in superseded(job)]
    match = [path for path in found if path.name == name or path.name.startswith(f"{name}-")]
    key = checkpoint_key(original_name(match[0])) if len(match) == 1 else None
    if key is None:
        _refuse_own(job, name)
        what = f"{len(match)} superseded checkpoints" if match else "no checkpoint"
        raise UsageError(
            f"{job.root} has {what} called {name}: elastic-ckpt list {job.root} shows all"
        )
    return job, match[0], key


def _refuse_own(job: JobDirectory, name: str) -> None:
    """Say how to go back to one of the script's own checkpoints: by hand, as they lie where the
    script wants them."""
    key, every = checkpoint_key(name), seals(job)
    wanted = {Path(name).name, *([] if key is None else [f"step {key[1]}"])}
    for at, one in enumerate(every):
        if wanted & {Path(one.path).name, f"step {one.step}"}:
            newer = shlex.join(dict.fromkeys(two.path for two in every[:at] if not two.copied))
            how = f": mkdir ELSEWHERE && mv {newer} ELSEWHERE" if newer else ""
            raise UsageError(
                f"{one.path} is one of the script's own checkpoints, which elastic-ckpt does not "
                f"move back: move what is newer away, then run without --from{how}"
            )
