"""The memory tier: two generations of a node's newest checkpoints, in shared memory.

::

    /dev/shm/elastic-ckpt-0-3f9c.../     one job on one node, for its owner alone
        owner.json                       whose it is; locked while the supervisor lives
        bell                             a FIFO: a byte in it means that something was sealed
        a/  b/                           the two generations
            state/                       laid out as a checkpoint
            seal.json                    sizes and attempt; it goes before anything is overwritten
            settled                      the attempt that is on disk, and may be overwritten
            spare/                       the buffers of what stood here before, to be written again

The files belong to no worker: they outlive the death of any process of the job. A generation is
never overwritten while a process reads it, nor before it is on disk (or cannot get there).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.manifest import SealHeader
from elastic_ckpt.checkpoint.memory.generation import (
    GENERATIONS,
    NAME,
    SLOTS,
    Generation,
    Sealed,
    check_covers,
)
from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
from elastic_ckpt.checkpoint.memory.part import MemoryAttempt
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.tier import Ref, Stored, TierBusy, TierFull
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import read_bounded, remove_tree
from elastic_ckpt.util.progress import Watch
from elastic_ckpt.util.units import human_bytes

_PREFIX: Final = "elastic-ckpt-"


class MemoryUnusable(Exception):
    """The memory tier cannot be made, for the given reason. The job saves to disk instead."""


class _Owner(msgspec.Struct, frozen=True):
    """Whose a tier is: the job directory and the identity that stands in it."""

    root: str
    identity: str
    node: str


class MemoryTier:
    """One job's generations on this node. See :class:`elastic_ckpt.checkpoint.tier.Tier`.

    Args:
        root: the tier's directory.
        mappings: of the files that this process writes, kept from save to save.
        session: whose generations a restart may take; both serve all sessions of the job.
    """

    name = NAME
    every_byte = False

    def __init__(self, root: Path, mappings: Mappings | None = None, session: str = "") -> None:
        self.root = root
        self._mappings = mappings or Mappings()
        self._session = session

    def of_session(self, name: str) -> MemoryTier:
        """Return the same tier for another session."""
        return MemoryTier(self.root, self._mappings, name)

    @property
    def generations(self) -> list[Generation]:
        """Both, sealed or not."""
        return [Generation(self.root / name) for name in SLOTS]

    def sealed(self) -> list[Sealed]:
        """Return what can be loaded or drained, of all sessions, newest first."""
        found = [(one, one.seal()) for one in self.generations]
        intact = [Sealed(one, seal) for one, seal in found if seal is not None]
        return sorted(intact, key=lambda one: one.age, reverse=True)

    def own(self) -> list[Sealed]:
        """Return what this session can load, newest first."""
        return [one for one in self.sealed() if one.seal.session == self._session]

    def begin(self, step: int, size: int, identity: str | None = None) -> MemoryAttempt:
        """Overwrite what has no seal, or is on disk."""
        room = room_bytes(self.root) + self.held_bytes()
        if GENERATIONS * size > room:
            raise TierFull(
                0,
                f"the memory tier needs {human_bytes(GENERATIONS * size)}, and only "
                f"{human_bytes(room)} are available",
            )
        generation = self.free()
        if generation is None:
            raise TierBusy(0, "both generations of the memory tier wait for their drain")
        generation.begin()
        return MemoryAttempt(generation, identity or secrets.token_hex(8), self._mappings)

    def join(self, ref: Ref) -> MemoryAttempt:
        return MemoryAttempt(self._generation(ref), ref.attempt, self._mappings)

    def newest(self) -> Stored | None:
        return next((one.stored for one in self.own()), None)

    def candidates(self, world_size: int) -> list[Stored]:
        """Return those of this world size: a generation cannot be resharded."""
        return [one.stored for one in self.own() if one.seal.world_size == world_size]

    def holds(self, seal: SealHeader) -> bool:
        return any(one.seal.attempt == seal.attempt for one in self.sealed())

    def open(self, ref: Ref) -> MemoryReading:
        return MemoryReading(self._generation(ref), ref)

    def where(self, ref: Ref) -> str:
        return str(self.root / ref.name)

    def reject(self, ref: Ref, why: str) -> str:
        """Leave it until a save overwrites it."""
        return ""

    def free(self) -> Generation | None:
        """Return a generation that may be overwritten, its seal removed; None if there is none. The
        other keeps its seal, whatever happens to the new one. Leader only."""
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
        """Return the bytes of all buffers."""
        total = 0
        for directory, _, names in os.walk(self.root):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(directory, name)).st_blocks * 512
        return total

    def _generation(self, ref: Ref) -> Generation:
        if ref.name not in SLOTS:
            raise CheckpointRejected(f"the memory tier has no generation {ref.name!r}")
        return Generation(self.root / ref.name)


class MemoryReading:
    """See :class:`elastic_ckpt.checkpoint.tier.Reading`. The seal has only sizes."""

    def __init__(self, generation: Generation, ref: Ref) -> None:
        """Lock the generation against being overwritten; raises as the protocol's ``open``."""
        self.ref = ref
        self.path = generation.path
        self._lock = generation.lock()
        seal = generation.seal()
        if seal is None or seal.attempt != ref.attempt:
            self.close()
            raise CheckpointRejected("it is not sealed, was overwritten, or a file is missing")
        self.seal = seal

    def verify(self, rank: int, world_size: int, watch: Watch) -> None:
        """Check the ranks alone: ``open`` compared the sizes."""
        check_covers(self.seal, world_size)

    def confirm(self) -> None:
        """Accept it: only the ranks write to a generation, and they are loading it."""

    def mark_verified(self) -> None:
        """Do nothing: no byte was hashed."""

    def close(self) -> None:
        self._lock.release()


class OwnedTier:
    """A supervisor's tier: no other process adopts or removes it meanwhile."""

    def __init__(self, place: Path, job: JobDirectory, node: str) -> None:
        """Make the tier, or take over what a killed supervisor of this very job left.
        MemoryUnusable if something else is in its place, or it cannot be made."""
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
            # It is new, or was another job's: its steps are not ours.
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
        """Release it, and with ``remove`` delete it."""
        if remove:
            remove_tree(self.tier.root)
        os.close(self.bell)
        os.close(self._fd)


def tier_path(place: Path, job: JobDirectory, node: str) -> Path:
    """Return where a job's tier is on a node: the same for each of its runs."""
    name = hashlib.sha256(f"{job.root}\0{node}".encode()).hexdigest()[:16]
    return place / f"{_PREFIX}{os.getuid()}-{name}"


def tier_of(job: JobDirectory, root: str) -> MemoryTier | None:
    """Return the tier named in a record of the job directory, if it exists and is this job's."""
    path = Path(root)
    owner = _read_owner(path) if root and _is_ours(path) else None
    with contextlib.suppress(OSError):
        if owner and (owner.root, owner.identity) == (str(job.root), job.known_identity()):
            return MemoryTier(path)
    return None


def sweep(place: Path) -> list[Path]:
    """Remove this user's tiers whose job directory is gone, or is another job's by now; not one
    that a supervisor holds, or whose job can still be run."""
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
    """Return the identity in a job directory; None if it is certainly gone. OSError: not known."""
    try:
        return JobDirectory(Path(root)).known_identity()
    except FileNotFoundError:
        return None


def _open_owner(root: Path) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(root, 0o700)
    if not _is_ours(root):
        raise MemoryUnusable(f"{root} belongs to another user, or is not a directory")
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
