"""What a tier is: a place that holds sealed checkpoints. Memory and the disk implement it.

::

    begin ─> Attempt ─> part(rank) per rank ─> seal     a checkpoint
                                            └> drop     nothing
    newest, candidates ─> open ─> Reading ─> verify ─> rest ─> confirm ─> close

A save goes to the fastest tier with room, and a drain copies it to the next one. Every tier passes
``tests/unit/checkpoint/test_tiers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from elastic_ckpt.checkpoint.manifest import FileEntry, Manifest, SealHeader
from elastic_ckpt.checkpoint.memory.seal import MemorySeal
from elastic_ckpt.errors import CheckpointError, StorageFailed
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import Watch

Ranges = Mapping[str, Sequence[tuple[int, int]]]
"""By path in a checkpoint, the bytes that a rank will read of a file: from, and up to."""


class TierFull(StorageFailed):
    """A tier cannot take this save now; another tier may."""


class TierBusy(TierFull):
    """The tier has room again once a drain is done."""


@dataclass(frozen=True)
class Ref:
    """Names one attempt or checkpoint to every process that sees its tier.

    Attributes:
        tier: the ``name`` of the tier.
        name: its own name in the tier: a slot, or the name or path of a directory.
        attempt: identity of the attempt; empty if a user named the checkpoint.
    """

    tier: str
    name: str
    attempt: str = ""

    def encode(self) -> bytes:
        """Return it as the leader sends it to the other ranks."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Ref:
        """Return what the leader sent."""
        return msgspec.json.decode(data, type=cls)


@dataclass(frozen=True)
class Stored:
    """A checkpoint in a tier, before it is opened.

    Attributes:
        key: its (epoch, step), by which checkpoints of all tiers are ordered.
        seal: None if it is not intact.
        why: why it is not intact; None if it is.
    """

    ref: Ref
    key: tuple[int, int]
    seal: Manifest | MemorySeal | None
    why: CheckpointError | None = None


class Sink(Protocol):
    """An open file of a part. ``torch.save`` accepts it."""

    def write(self, data: Any) -> int:
        """Append anything with a buffer, which the caller may reuse after the call."""

    def flush(self) -> None:
        """Do nothing; nothing is held back."""


class Part(Protocol):
    """What one rank writes its files through. One thread of that rank, in any order of files."""

    rank: int

    @property
    def paths(self) -> list[str]:
        """The files written or claimed so far."""

    def open(
        self, path: str, size: int | None = None, *, paged: bool = False
    ) -> AbstractContextManager[Sink]:
        """Write a new file. It belongs to the part once the block ends without an error.

        Args:
            path: relative; missing directories are made.
            size: bytes that will be written, if known: the write is then a single copy.
            paged: a hint: each write but the last is whole pages at the address of a page.

        Raises:
            CheckpointRejected: the path leaves the checkpoint.
            OSError: the file was written before (EEXIST), or the storage failed.
        """

    def write(self, path: str, data: bytes) -> None:
        """Write a small file; raises as :meth:`open`."""

    def claim(self, path: str) -> None:
        """Add a file that other code put into the attempt's ``path``. A repeat reads it again.

        Raises:
            CheckpointRejected: it is not a regular file with one name.
            OSError: it cannot be read, or the storage failed.
        """

    def finish(self, world_size: int, header: SealHeader | None) -> list[FileEntry]:
        """Make the part durable, as far as its tier is, and return its files.

        Called once by each rank, after its last file; a repeat returns the same.

        Args:
            header: what the checkpoint is; from rank 0 only.

        Raises:
            OSError: the storage failed.
        """


class Attempt(Protocol):
    """One attempt at one checkpoint. Nothing loads it before the seal, however it was killed."""

    @property
    def ref(self) -> Ref:
        """The name under which the other ranks :meth:`Tier.join` it."""

    @property
    def path(self) -> Path:
        """A local directory for code that writes files by path; they are claimed afterwards.

        A tier without directories gives a staging directory, and uploads what is claimed.
        """

    def part(self, rank: int) -> Part:
        """Return the part of a rank. That rank calls it once per attempt."""

    def seal(self, header: SealHeader, files: Sequence[FileEntry], retention: Retention) -> Ref:
        """Turn the attempt into a checkpoint. Leader only, after all parts were finished.

        Atomic: a kill at any moment leaves the attempt or the checkpoint. If an intact checkpoint
        of the same step is in its place, the tier may keep that one instead. A repeat of a seal
        that succeeded changes nothing and succeeds.

        Args:
            files: what all parts returned.
            retention: the rule to apply once the checkpoint reaches the slowest tier; a tier
                whose caller prunes ignores it.

        Returns:
            The checkpoint that is now there.

        Raises:
            CheckpointRejected: no checkpoint can hold these files: too many, or one twice.
            OSError: the storage failed; there is no new checkpoint, or not a durable one.
        """

    def drop(self) -> None:
        """Give the attempt up. Leader only; never raises. After a seal, or again, it does nothing.

        What cannot be removed now is removed at the job's next start.
        """


class Rest(Protocol):
    """What is not here of a checkpoint's large files after :meth:`Reading.verify`.

    Every rank calls each method once, in this order, and waits for the others in between.
    """

    def want(self, ranges: Ranges | None) -> None:
        """Tell the other ranks of this machine what this rank will read.

        Args:
            ranges: files that are not in it are brought in full; None for all of them.

        Raises:
            OSError: the local disk failed.
        """

    def bring(self, watch: Watch) -> None:
        """Bring this rank's share of what the ranks of this machine want, and verify it.

        Raises:
            CheckpointRejected: it is damaged.
            OSError: it could not be read; the checkpoint may be good.
        """

    def settle(self) -> None:
        """Note what the files are like now, so that ``confirm`` sees changes.

        Raises:
            OSError: the local disk failed.
        """


class Reading(Protocol):
    """A checkpoint that one rank holds open: no process deletes or overwrites it until close."""

    @property
    def ref(self) -> Ref:
        """The name it was opened by."""

    @property
    def seal(self) -> Manifest | MemorySeal:
        """What the checkpoint says of itself."""

    @property
    def path(self) -> Path:
        """A local directory with the files, laid out as in docs/format.md, after ``verify``.

        A tier without directories fetches the files in ``verify``, but for the ``rest``.
        """

    def verify(self, rank: int, world_size: int, watch: Watch) -> None:
        """Verify this rank's share. Every rank calls it once; it is accepted if none raises.

        Raises:
            CheckpointRejected: it is damaged, or these ranks cannot load it.
            OSError: it could not be read; the checkpoint may be good.
        """

    @property
    def rest(self) -> Rest | None:
        """What ``verify`` left; None, on all ranks, if every file is there in full.

        Until it is brought, there are JSON files, small ones, and the first ``CHUNK_BYTES`` of each
        large one, which has its size.
        """

    def confirm(self) -> None:
        """Check that what was verified did not change while it was loaded. Every rank, once.

        Raises:
            CheckpointRejected: it changed.
        """

    def mark_verified(self) -> None:
        """Record that every byte was read and matched. Leader only, after all ranks confirmed.

        A repeat changes nothing. Never raises; a tier that cannot record it does nothing.
        """

    def close(self) -> None:
        """Let go of the checkpoint. A repeat does nothing."""


class Tier(Protocol):
    """A place that holds checkpoints. Cheap to make; every process makes its own."""

    name: str
    """Shown in ``status``, ``list`` and the journal."""

    every_byte: bool
    """Whether :meth:`Reading.verify` reads every byte, or compares only sizes."""

    def begin(self, step: int, size: int, identity: str | None = None) -> Attempt:
        """Start an attempt. The leader of the ranks calls it once per save, a drain once per copy.

        A repeat starts another attempt. What an attempt that was killed left may be reused.

        Args:
            size: about how many bytes will be written.
            identity: of the attempt that is copied here; a new one by default. What an earlier
                copy of it left is removed.

        Raises:
            TierFull: there is no room; nothing changed. TierBusy, if a drain will make room.
            OSError, DirectoryUnusable: the storage failed.
        """

    def join(self, ref: Ref) -> Attempt:
        """Return the attempt that the leader began. Every other rank, once; touches nothing."""

    def newest(self) -> Stored | None:
        """Return the newest intact checkpoint; None if there is none. Any process, at any time.

        Raises:
            OSError: the storage does not answer.
        """

    def candidates(self, world_size: int) -> list[Stored]:
        """Return what a restart on this number of ranks may load, newest first.

        Lists at least everything down to the first intact one. Leader only; changes nothing.

        Raises:
            UnsupportedFormat: a newer version wrote one that is newer than all intact ones.
            OSError: the storage does not answer.
        """

    def holds(self, seal: SealHeader) -> bool:
        """Return whether this very attempt is sealed and intact here. Never raises."""

    def open(self, ref: Ref) -> Reading:
        """Open a checkpoint. Every rank opens it once per load; several may be open.

        Raises:
            CheckpointRejected: it is not sealed, its seal is invalid, or it was replaced.
            UnsupportedFormat: a newer version wrote it.
            OSError: it could not be read; the checkpoint may be good.
        """

    def where(self, ref: Ref) -> str:
        """Return where people find a checkpoint: a path or a URL, for messages and the journal."""

    def reject(self, ref: Ref, why: str) -> str:
        """Keep a checkpoint that failed verification out of later restarts. Leader only.

        A repeat does nothing.

        Returns:
            Where it was moved; empty if it stays or is gone.

        Raises:
            OSError, DirectoryUnusable: it cannot be moved.
        """
