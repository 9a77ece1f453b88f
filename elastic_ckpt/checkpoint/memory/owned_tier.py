"""A supervisor's hold on what its job has in memory, wherever an earlier run has left it."""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.memory.owner import (
    TierOwner,
    hold_tier,
    is_private,
    read_tier_owner,
    tier_path,
    tiers_in,
    write_tier_owner,
)
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import remove_tree

BELL: Final = "bell"
_NOTHING: Final = (-1,)


class MemoryUnusable(Exception):
    """The memory tier cannot be made, for the given reason. The job saves to disk instead."""


@dataclass
class _Held:
    """A tier of this job, and the descriptor that locks it."""

    root: Path
    fd: int

    @property
    def newest(self) -> tuple[int, ...]:
        sealed = MemoryTier(self.root).sealed()
        return sealed[0].age if sealed else _NOTHING


class OwnedTier:
    """All that this job has in memory: no other process adopts or removes it meanwhile.

    The tier with the newest checkpoint lies where this run's workers look. What a run under another
    node name or an older version left is drained from where it is.

    Attributes:
        tier: what this run's workers use.
        bell: a descriptor that is readable when a worker has sealed something.
        elsewhere: tiers with this job's identity whose directory had another path. Whether the job
            has moved or was copied is for the caller to find out: that directory may not answer.
    """

    def __init__(self, place: Path, job: JobDirectory, node: str) -> None:
        """Take over what an earlier run of this very job left, or make the tier. Reads no disk.

        Raises:
            MemoryUnusable: another process uses it, or it cannot be made.
        """
        self._owner = TierOwner(str(job.root), job.identity(), node)
        self._path = tier_path(place, job)
        self._held: list[_Held] = []
        self.tier = MemoryTier(self._path)
        self.elsewhere: list[Path] = []
        try:
            for root in tiers_in(place):
                self._consider(root)
            if not self._held:
                self._make()
            self._put_newest_first()
            bell = self._path / BELL
            bell.unlink(missing_ok=True)
            os.mkfifo(bell, 0o600)
            # For reading and writing, or it would seem closed whenever no worker has it open.
            self.bell = os.open(bell, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            self._let_go()
            raise MemoryUnusable(f"{self._path}: {error.strerror or error}") from None
        except BaseException:
            self._let_go()
            raise

    @property
    def older(self) -> list[MemoryTier]:
        """Further tiers of this job: they are only drained."""
        return [MemoryTier(one.root) for one in self._held if one.root != self._path]

    def sealed(self) -> list[Sealed]:
        """Return what is sealed in any of them, newest first."""
        found = [one for tier in (self.tier, *self.older) for one in tier.sealed()]
        return sorted(found, key=lambda one: one.age, reverse=True)

    def adopt(self, root: Path) -> bool:
        """Take over one of :attr:`elsewhere`, before workers run; False if a run uses it."""
        with contextlib.suppress(OSError):
            count = len(self._held)
            self._take(root)
            if len(self._held) > count:
                with contextlib.suppress(OSError):  # else it is drained from where it is
                    self._put_newest_first()
                return True
        return False

    def drop_drained(self) -> None:
        """Remove the older tiers that hold nothing more than the disk does."""
        for one in [one for one in self._held if one.root != self._path]:
            if not MemoryTier(one.root).keeps_work:
                remove_tree(one.root)
                os.close(one.fd)
                self._held.remove(one)

    def release(self, *, remove: bool) -> None:
        """Release all; with ``remove`` delete the tier, with the older ones that are drained."""
        self.drop_drained()
        if remove:
            remove_tree(self._path)
        os.close(self.bell)
        self._let_go()

    def _consider(self, root: Path) -> None:
        owner = read_tier_owner(root)
        if root == self._path:
            if owner is not None and owner.identity != self._owner.identity:
                raise MemoryUnusable(f"{root} belongs to another job")
            self._take(root)
        elif owner is not None and owner.identity and owner.identity == self._owner.identity:
            if owner.root == self._owner.root:
                self._take(root)
            else:
                self.elsewhere.append(root)

    def _take(self, root: Path) -> None:
        try:
            fd = hold_tier(root, create=root == self._path)
        except BlockingIOError:
            if root == self._path:
                raise MemoryUnusable(f"another process uses {root}") from None
            return  # it is in use, and so somebody looks after it
        self._held.append(_Held(root, fd))
        write_tier_owner(fd, self._owner)

    def _make(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._path, 0o700)
        if not is_private(self._path):
            raise MemoryUnusable(f"{self._path} belongs to another user, or is not a directory")
        self._take(self._path)

    def _put_newest_first(self) -> None:
        """Have the tier with the newest checkpoint be the one that workers load from.

        The locks and the bell are on files, and so move with them.
        """
        first = max(self._held, key=lambda one: (one.newest, one.root == self._path))
        if first.root == self._path:
            return
        before = next((one for one in self._held if one.root == self._path), None)
        if before is not None:
            aside = self._path.with_name(f"{self._path.name}-{secrets.token_hex(4)}")
            os.rename(self._path, aside)
            before.root = aside
        os.rename(first.root, self._path)
        first.root = self._path
        if before is not None:
            with contextlib.suppress(FileNotFoundError):
                os.rename(before.root / BELL, self._path / BELL)

    def _let_go(self) -> None:
        for one in self._held:
            os.close(one.fd)
        self._held.clear()
