"""What no run looks after and no disk has: checkpoints that killed or failed runs left in memory.

They are never removed by themselves, however gone the disk of their job looks: it may be unmounted
for repair, or mounted late. ``status`` and ``doctor`` list them, ``prune --memory`` removes one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.memory.generation import SEAL_NAME
from elastic_ckpt.checkpoint.memory.owner import (
    hold_tier,
    is_held,
    is_tier,
    read_tier_owner,
    tiers_in,
)
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.errors import LockHeld, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import remove_tree
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer

DRAINED_SECONDS: Final = 3600.0
"""How long a killed run's tier stays that the disk has all of: a restart from it is faster."""

ANSWER_SECONDS: Final = 3.0
"""How long another job's directory may take to say whether it is still there."""


@dataclass(frozen=True)
class Leftover:
    """A tier that no run uses and that holds a checkpoint which no disk has.

    Attributes:
        tier: its directory.
        job: the job's directory, which may be unmounted or gone; empty if unknown.
        identity: the job's.
        step: of the newest checkpoint that is in memory only; None if it cannot be read.
        bytes: memory that it takes.
        age_seconds: since that checkpoint was sealed, or since the tier last changed.
        is_share: it is what one of several nodes had of a checkpoint, and no checkpoint alone.
    """

    tier: Path
    job: str
    identity: str
    step: int | None
    bytes: int
    age_seconds: float
    is_share: bool = False


def leftovers(places: Iterable[Path]) -> list[Leftover]:
    """Return what was left in these places, the largest first; looks at no job's directory."""
    roots = [root for place in dict.fromkeys(places) for root in tiers_in(place)]
    found = [one for root in roots if (one := _leftover(root)) and not is_held(root)]
    return sorted(found, key=lambda one: -one.bytes)


def remove_leftover(root: Path, *, dry_run: bool = False) -> Leftover:
    """Remove a tier with all that it holds.

    Raises:
        UsageError: it is not a tier of this user.
        LockHeld: a run uses it.
    """
    if not is_tier(root):
        raise UsageError(
            f"{root} is not a memory tier of this user: doctor lists what was left in memory"
        )
    found = _leftover(root) or _describe(root, None)
    try:
        fd = hold_tier(root, create=True)
    except BlockingIOError:
        raise LockHeld(f"a run of {found.job or 'its job'} uses {root}: stop that first") from None
    except OSError as error:
        raise UsageError(f"cannot open {root}: {error.strerror}") from None
    try:
        if not dry_run:
            remove_tree(root)
    finally:
        os.close(fd)
    return found


def drop_drained(place: Path) -> list[Path]:
    """Remove this user's tiers that no run uses and whose every checkpoint is on a disk.

    Only those that have not been used for an hour: their jobs may be about to run again.
    """
    dropped: list[Path] = []
    for root in tiers_in(place):
        try:
            if MemoryTier(root).keeps_work or _age_of_tier(root) < DRAINED_SECONDS:
                continue
            fd = hold_tier(root)
        except OSError:  # in use, or half made by a run that begins
            continue
        try:
            if not MemoryTier(root).keeps_work:
                remove_tree(root)
                dropped.append(root)
        finally:
            os.close(fd)
    return dropped


def has_moved(root: Path, job: JobDirectory) -> bool | None:
    """Return whether a tier with this job's identity is this job's: its directory has moved.

    False if that directory is still there, and this one is a copy of it; None if it does not
    answer. Looks in a child process, for :data:`ANSWER_SECONDS`.
    """
    owner = read_tier_owner(root)
    if owner is None:
        return None
    root_then = owner.root

    def look() -> Generator[bool, None, None]:
        yield _is_gone(root_then, job)

    try:
        return bool(answer(look, bool, ANSWER_SECONDS))
    except (NoAnswer, WorkFailed):
        return None


def _is_gone(root: str, job: JobDirectory) -> bool:
    try:
        if JobDirectory(Path(root)).known_identity() != job.known_identity():
            return True
        return job.root.samefile(root)
    except (FileNotFoundError, NotADirectoryError):
        return True


def _leftover(root: Path) -> Leftover | None:
    tier = MemoryTier(root)
    undrained = tier.undrained()
    if undrained:
        newest = undrained[-1]
        found = _describe(root, newest.seal.step, newest.generation.slot / SEAL_NAME)
        return replace(found, is_share=not newest.seal.is_whole)
    return _describe(root, None) if tier.keeps_work else None


def _describe(root: Path, step: int | None, dated: Path | None = None) -> Leftover:
    owner = read_tier_owner(root)
    return Leftover(
        root,
        owner.root if owner else "",
        owner.identity if owner else "",
        step,
        MemoryTier(root).held_bytes(),
        _age([dated]) if dated else _age_of_tier(root),
    )


def _age_of_tier(root: Path) -> float:
    return _age([root, *root.glob("*"), *root.glob("*/*")])


def _age(paths: Iterable[Path]) -> float:
    """Return the seconds since one of these was changed."""
    changed = 0.0
    for path in paths:
        with contextlib.suppress(OSError):
            changed = max(changed, os.lstat(path).st_mtime)
    return max(0.0, time.time() - changed)
