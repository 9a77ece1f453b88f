"""The memory tier: two generations of a node's newest checkpoints, in shared memory.

::

    /dev/shm/elastic-ckpt-0-3f9c.../     one job on one node, for its owner alone
        owner.json                       whose it is; locked while the supervisor lives
        bell                             a FIFO: a byte in it says that something was sealed
        a/  b/                           the two generations
            state/                       laid out as a checkpoint
            seal.json                    sizes and attempt; it goes before anything is overwritten
            settled                      the attempt that is on disk, and may be overwritten
            spare/                       the buffers of what stood here before, to be written again

The files belong to no worker: they outlive the death of any process of the job. A generation is
never overwritten while somebody reads it, nor before it is on disk (or cannot get there).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    MemorySeal,
    SealHeader,
    decode_memory_seal,
    encode,
    make_memory_seal,
)
from elastic_ckpt.checkpoint.read_lock import ReadLock, removing
from elastic_ckpt.checkpoint.verify import verify_sizes
from elastic_ckpt.errors import CheckpointError, CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.files import read_bounded, remove_tree, write_atomic

SEAL_NAME: Final = "seal.json"
SLOTS: Final = ("a", "b")
GENERATIONS: Final = len(SLOTS)
_PREFIX: Final = "elastic-ckpt-"


class MemoryUnusable(Exception):
    """There can be no memory tier here; the text says why. The job saves to disk instead."""


class _Owner(msgspec.Struct, frozen=True):
    """Whose a tier is: the job directory and the identity that stands in it."""

    root: str
    identity: str
    node: str


@dataclass(frozen=True)
class Generation:
    """One of the two buffers.

    Attributes:
        slot: its directory.
    """

    slot: Path

    @property
    def path(self) -> Path:
        """What is laid out as a checkpoint."""
        return self.slot / "state"

    @property
    def spare(self) -> Path:
        """Files that the next checkpoint may be written into."""
        return self.slot / "spare"

    def seal(self) -> MemorySeal | None:
        """Its seal, if it has one that is whole and every file has its size."""
        try:
            seal = decode_memory_seal(read_bounded(self.slot / SEAL_NAME, MAX_MANIFEST_BYTES))
            verify_sizes(self.path, seal.files)
        except (OSError, CheckpointError):
            return None
        return seal

    def lock(self) -> ReadLock:
        """Keep it from being overwritten.

        Raises:
            BeingRemoved: its seal is gone.
        """
        return ReadLock(self.slot, SEAL_NAME)

    def is_settled(self, seal: MemorySeal) -> bool:
        """Whether the disk holds it, or will not."""
        try:
            return read_bounded(self.slot / "settled", 64) == seal.attempt.encode()
        except OSError:
            return False

    def settle(self, seal: MemorySeal) -> None:
        """It is on disk, or cannot get there: the next save may take its place."""
        with contextlib.suppress(OSError):
            write_atomic(self.slot / "settled", seal.attempt.encode())

    def clear(self) -> bool:
        """Take the seal away, so that it may be overwritten; False if somebody reads it."""
        try:
            with removing(self.slot, SEAL_NAME) as why:
                if why:
                    return False
                (self.slot / SEAL_NAME).unlink()
        except FileNotFoundError:
            pass  # there is none
        return True

    def begin(self) -> None:
        """Turn what stands here into spare buffers. Leader only, after :meth:`clear`."""
        self.slot.mkdir(mode=0o700, exist_ok=True)
        if self.path.exists():
            remove_tree(self.spare)
            os.rename(self.path, self.spare)
        for directory in (self.path, self.path / "ranks"):
            directory.mkdir(mode=0o700)

    def close(
        self,
        header: SealHeader,
        files: Sequence[FileEntry],
        seconds: float,
        retention: Retention,
    ) -> None:
        """Seal it. Leader only, when every rank has written all of its files."""
        remove_tree(self.spare)
        seal = make_memory_seal(header, files, seconds, retention)
        write_atomic(self.slot / SEAL_NAME, encode(seal))


@dataclass(frozen=True)
class Sealed:
    """A generation with its seal."""

    generation: Generation
    seal: MemorySeal

    @property
    def key(self) -> tuple[int, int]:
        """What decides which one is newer."""
        return self.seal.epoch, self.seal.step

    @property
    def settled(self) -> bool:
        """Whether the disk holds it, or will not."""
        return self.generation.is_settled(self.seal)


class MemoryTier:
    """One job's generations on this node."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def generations(self) -> list[Generation]:
        """Both, sealed or not."""
        return [Generation(self.root / name) for name in SLOTS]

    def sealed(self) -> list[Sealed]:
        """What can be loaded or drained, newest first."""
        found = [(one, one.seal()) for one in self.generations]
        whole = [Sealed(one, seal) for one, seal in found if seal is not None]
        return sorted(whole, key=lambda one: one.key, reverse=True)

    def newest(self) -> Sealed | None:
        """The newest that is whole."""
        return next(iter(self.sealed()), None)

    def free(self) -> Generation | None:
        """A generation that may be overwritten, its seal gone by now; None if there is none.

        Whatever happens to the new one, the other keeps its seal. Leader only.
        """
        sealed = self.sealed()
        held = {one.generation for one in sealed}
        for generation in self.generations:
            if generation not in held and generation.clear():
                return generation
        for one in reversed(sealed):
            if one.settled and one.generation.clear():
                return one.generation
        return None

    def held_bytes(self) -> int:
        """Bytes of all buffers."""
        total = 0
        for directory, _, names in os.walk(self.root):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(directory, name)).st_blocks * 512
        return total

    def ring(self) -> None:
        """Wake the supervisor: something was sealed."""
        with contextlib.suppress(OSError):
            fd = os.open(self.root / "bell", os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                os.write(fd, b"x")
            finally:
                os.close(fd)


class OwnedTier:
    """A supervisor's hold on its tier: nobody else adopts or removes it meanwhile."""

    def __init__(self, place: Path, job: JobDirectory, node: str) -> None:
        """Make the tier, or take over what a killed supervisor of this very job left.

        Raises:
            MemoryUnusable: something that is not ours is in its place, or the place is no good.
        """
        self.tier = MemoryTier(tier_path(place, job, node))
        owner = _Owner(str(job.root), job.identity(), node)
        try:
            self._fd = _open_owner(self.tier.root)
            try:
                self._take(owner)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise MemoryUnusable(f"{self.tier.root}: {error.strerror or error}") from None

    def _take(self, owner: _Owner) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _read_owner(self.tier.root) != owner:
            # Another job had this path, or nobody: its steps are not ours.
            for generation in self.tier.generations:
                remove_tree(generation.slot)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, msgspec.json.encode(owner), 0)
        bell = self.tier.root / "bell"
        bell.unlink(missing_ok=True)
        os.mkfifo(bell, 0o600)
        # For reading and writing, or it would seem closed whenever no worker has it open.
        self.bell = os.open(bell, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)

    def release(self, *, remove: bool) -> None:
        """Let go of it; ``remove`` leaves nothing behind."""
        if remove:
            remove_tree(self.tier.root)
        os.close(self.bell)
        os.close(self._fd)


def tier_path(place: Path, job: JobDirectory, node: str) -> Path:
    """Where a job's tier is on a node: the same for each of its runs."""
    name = hashlib.sha256(f"{job.root}\0{node}".encode()).hexdigest()[:16]
    return place / f"{_PREFIX}{os.getuid()}-{name}"


def tier_of(job: JobDirectory, root: str) -> MemoryTier | None:
    """The tier that a record in the job directory speaks of, if it is there and is this job's."""
    path = Path(root)
    owner = _read_owner(path) if root and _is_ours(path) else None
    with contextlib.suppress(OSError):
        if owner and (owner.root, owner.identity) == (str(job.root), job.known_identity()):
            return MemoryTier(path)
    return None


def sweep(place: Path) -> list[Path]:
    """Remove this user's tiers whose job directory is gone, or is another job's by now.

    A tier that a supervisor holds is left alone, and so is one whose job can still be run.
    """
    removed: list[Path] = []
    with contextlib.suppress(OSError):
        for root in place.glob(f"{_PREFIX}{os.getuid()}-*"):
            if _is_ours(root) and _is_stale(root):
                remove_tree(root)
                removed.append(root)
    return removed


def _is_stale(root: Path) -> bool:
    owner = _read_owner(root)
    try:
        fd = os.open(root / "owner.json", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False  # half made by a run that begins
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return owner is not None and _identity_of(owner.root) != owner.identity
    except OSError:
        return False
    finally:
        os.close(fd)


def _identity_of(root: str) -> str | None:
    """The identity in a job directory; None if it is certainly gone.

    Raises:
        OSError: the disk does not answer, which says nothing.
    """
    try:
        return JobDirectory(Path(root)).known_identity()
    except FileNotFoundError:
        return None


def _open_owner(root: Path) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(root, 0o700)
    if not _is_ours(root):
        raise MemoryUnusable(f"{root} belongs to somebody else, or is no directory")
    return os.open(root / "owner.json", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _is_ours(root: Path) -> bool:
    try:
        found = os.lstat(root)
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and stat.S_IMODE(found.st_mode) == 0o700
    )


def _read_owner(root: Path) -> _Owner | None:
    try:
        return msgspec.json.decode(read_bounded(root / "owner.json", 64 * 1024), type=_Owner)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None


def check_covers(seal: MemorySeal, world_size: int) -> None:
    """Refuse to load a generation into another number of ranks, or one of which a part is missing.

    Raises:
        CheckpointRejected: with the reason.
    """
    if seal.world_size != world_size:
        raise CheckpointRejected(f"it is of {seal.world_size} ranks and there are {world_size}")
    if {entry.rank for entry in seal.files} - set(range(world_size)):
        raise CheckpointRejected("it holds a part of no rank")
