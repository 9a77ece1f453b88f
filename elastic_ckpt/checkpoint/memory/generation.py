"""One of the two buffers of the memory tier, with its seal."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.manifest import MAX_MANIFEST_BYTES, encode
from elastic_ckpt.checkpoint.memory.seal import MemorySeal, Share, SharePlaces, decode_memory_seal
from elastic_ckpt.checkpoint.ownership.read_lock import ReadLock, removing
from elastic_ckpt.checkpoint.tier import Ref, Stored
from elastic_ckpt.checkpoint.verify import verify_sizes
from elastic_ckpt.errors import CheckpointError, CheckpointRejected, UnsupportedFormat
from elastic_ckpt.util.files import read_bounded, remove_tree, write_atomic

NAME: Final = "memory"
SEAL_NAME: Final = "seal.json"
SLOTS: Final = ("a", "b")
GENERATIONS: Final = len(SLOTS)

_CAREFUL: Final = os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class Generation:
    """One of the two buffers, in the directory ``slot``."""

    slot: Path

    @property
    def path(self) -> Path:
        """The files, laid out as a checkpoint."""
        return self.slot / "state"

    @property
    def spare(self) -> Path:
        """Files that the next checkpoint may be written into."""
        return self.slot / "spare"

    def seal(self) -> MemorySeal | None:
        """Return its seal if it is valid and every file has its size; else None."""
        try:
            return self._read()
        except (OSError, CheckpointError):
            return None

    @property
    def is_unclear(self) -> bool:
        """Whether it may hold a checkpoint that this process cannot read: it must stay."""
        try:
            self._read()
        except UnsupportedFormat:
            return True
        except (FileNotFoundError, CheckpointError):
            return False
        except OSError:
            return True
        return False

    def _read(self) -> MemorySeal:
        seal = decode_memory_seal(read_bounded(self.slot / SEAL_NAME, MAX_MANIFEST_BYTES))
        verify_sizes(self.path, seal.files)
        return seal if seal.share is None else self._with_places(seal)

    def lock(self) -> ReadLock:
        """Keep it from being overwritten; BeingRemoved if its seal is gone."""
        return ReadLock(self.slot, SEAL_NAME)

    def is_settled(self, seal: MemorySeal) -> bool:
        """Return whether it is on disk, or will not be."""
        try:
            return read_bounded(self.slot / "settled", 64) == seal.attempt.encode()
        except OSError:
            return False

    def settle(self, seal: MemorySeal) -> None:
        """Record that it is on disk: the next save may overwrite it. Written into what
        :meth:`close` made, as there may be no memory left for a new file."""
        with contextlib.suppress(OSError):
            fd = os.open(self.slot / "settled", os.O_WRONLY | os.O_CREAT | _CAREFUL, 0o600)
            try:
                os.pwrite(fd, seal.attempt.encode(), 0)
                os.ftruncate(fd, len(seal.attempt))
            finally:
                os.close(fd)

    def note_places(self, attempt: str, share: Share, others: tuple[Share, ...]) -> None:
        """Record where the shares of its checkpoint are by now, which the seal says otherwise, and
        wake the supervisor, which drains it. The seal stays: readers hold a lock on that file."""
        with contextlib.suppress(OSError):  # it is drained as before, or not at all
            data = msgspec.json.encode(SharePlaces(attempt, share, others))
            write_atomic(self.slot / "places.json", data)
            ring(self.slot.parent)

    def _with_places(self, seal: MemorySeal) -> MemorySeal:
        with contextlib.suppress(OSError, msgspec.MsgspecError, CheckpointRejected):
            data = read_bounded(self.slot / "places.json", MAX_MANIFEST_BYTES)
            found = msgspec.json.decode(data, type=SharePlaces)
            if found.attempt == seal.attempt:
                return msgspec.structs.replace(seal, share=found.share, others=found.others)
        return seal

    def keeper(self, seal: MemorySeal) -> str:
        """Return the node that keeps it since this one leaves; empty without one."""
        with contextlib.suppress(OSError, ValueError):
            attempt, _, host = read_bounded(self.slot / "keeper", 1024).decode().partition(" ")
            return host if attempt == seal.attempt else ""
        return ""

    def note_keeper(self, seal: MemorySeal, host: str) -> None:
        """Record that another node keeps it from now on: here it may be overwritten."""
        with contextlib.suppress(OSError):  # it is said not to be saved then
            write_atomic(self.slot / "keeper", f"{seal.attempt} {host}".encode())
            self.settle(seal)

    def is_copied(self, seal: MemorySeal) -> bool:
        """Return whether another node has a copy of it."""
        with contextlib.suppress(OSError):
            return read_bounded(self.slot / "copied", 64) == seal.attempt.encode()
        return False

    def note_copied(self, seal: MemorySeal) -> None:
        """Record that another node has a copy of it."""
        with contextlib.suppress(OSError):  # it is said to be at risk then
            write_atomic(self.slot / "copied", seal.attempt.encode())

    def clear(self) -> bool:
        """Remove the seal, so that it may be overwritten; return False if a process reads it."""
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

    def close(self, seal: MemorySeal) -> None:
        """Seal it. One rank only, when every rank of this node has written all of its files."""
        remove_tree(self.spare)
        with contextlib.suppress(OSError):
            write_atomic(self.slot / "settled", b"-" * len(seal.attempt))
        write_atomic(self.slot / SEAL_NAME, encode(seal))


@dataclass(frozen=True)
class Sealed:
    """A generation with its seal."""

    generation: Generation
    seal: MemorySeal

    @property
    def key(self) -> tuple[int, int]:
        """Its (epoch, step), by which those of a session are ordered."""
        return self.seal.epoch, self.seal.step

    @property
    def age(self) -> tuple[int, int, int]:
        """See ``SealHeader.age``; generations of all sessions are ordered by it."""
        return self.seal.age

    @property
    def settled(self) -> bool:
        """Return whether it is on disk, or will not be."""
        return self.generation.is_settled(self.seal)

    @property
    def keeper(self) -> str:
        """The node that keeps it since this one leaves; empty without one."""
        return self.generation.keeper(self.seal)

    @property
    def stored(self) -> Stored:
        """Its description, as every tier gives it."""
        ref = Ref(NAME, self.generation.slot.name, self.seal.attempt)
        return Stored(ref, self.key, self.seal)


def check_covers(seal: MemorySeal, world_size: int) -> None:
    """Raise CheckpointRejected unless this number of ranks can load a generation."""
    if seal.world_size != world_size:
        raise CheckpointRejected(f"{seal.world_size} ranks saved it, and there are {world_size}")
    if {entry.rank for entry in seal.files} - set(range(world_size)):
        raise CheckpointRejected("it has files of an unknown rank")


def ring(root: Path) -> None:
    """Wake the supervisor: something was sealed."""
    with contextlib.suppress(OSError):
        fd = os.open(root / "bell", os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            os.write(fd, b"x")
        finally:
            os.close(fd)
