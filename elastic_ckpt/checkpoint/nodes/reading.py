"""A checkpoint in the memory of several nodes, brought together on one of them."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.manifest import CHUNK_BYTES, FileEntry, SealHeader
from elastic_ckpt.checkpoint.memory.generation import Sealed, check_covers
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.memory.seal import MemorySeal, Share, make_memory_seal
from elastic_ckpt.checkpoint.nodes.client import PIECE_BYTES, NodeMemory
from elastic_ckpt.checkpoint.ownership.read_lock import ReadLock
from elastic_ckpt.checkpoint.ranges.chunks import Chunk, LocalChunks, is_cut
from elastic_ckpt.checkpoint.ranges.rest import ChunkRest
from elastic_ckpt.checkpoint.tier import Ranges, Ref, Rest
from elastic_ckpt.checkpoint.verify import share_out
from elastic_ckpt.errors import CheckpointRejected, NodeLost
from elastic_ckpt.util.files import remove_tree
from elastic_ckpt.util.progress import Watch
from elastic_ckpt.util.units import human_bytes

RESHARDING: Final = ("torch", "colossalai")
"""The engines of which another number of ranks can load what several nodes have in memory."""

_FLOWS: Final = 8
"""Pieces on their way to a node at once."""

_WHAT: Final = "bringing a checkpoint from the other nodes' memory"


class SharesReading:
    """See :class:`elastic_ckpt.checkpoint.tier.Reading`. The ranks of a node bring what they read
    of the other nodes' files, a part each; its own files appear beside that under a second name.
    """

    seal: MemorySeal

    def __init__(
        self, root: Path, ref: Ref, share: Share, own: Sealed | None, shares: Sequence[Share]
    ) -> None:
        """Keep this node's generation, if it has one of the attempt, from being overwritten."""
        self.ref = ref
        self.path = brought(root) / ref.attempt
        self.rest: Rest | None = None
        self._root = root
        self._share = share
        self._own = own
        self._shares = shares
        self._others = [one for one in shares if own is None or one.first != own.seal.ranks.start]
        self._holders: dict[str, Share] = {}  # of each of the other nodes' files
        self._links = _Links()
        self._lock: ReadLock | None = own.generation.lock() if own is not None else None

    def verify(self, rank: int, world_size: int, watch: Watch) -> None:
        """Bring this rank's part of the small files that the node lacks, and of the first chunks of
        the large ones; each has the digest that its node took of its own memory. CheckpointRejected
        if a node is gone, or there is no room."""
        with _refusing():
            self._verify(rank - self._share.first, self._share.count, world_size, watch)
        self._links.close()  # until the script has built what is loaded, they would be given up

    def _verify(self, rank: int, of: int, world_size: int, watch: Watch) -> None:
        files = self._describe()
        if not can_load(self.seal, world_size):
            check_covers(self.seal, world_size)
        self._link_own()
        here = LocalChunks(self._fetch, self.path, max(1, _FLOWS // of))
        whole = [entry for entry in files if not is_cut(entry)]
        self._bring(here, share_out(whole, rank, of), watch)
        large = [entry for entry in files if is_cut(entry)]
        # Of any node: this one may have the only large files, and all ranks take the same steps.
        if any(is_cut(_with_chunks(entry)) for entry in self.seal.files):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            rest = _SharesRest(large, here, self.path, rank, of, _WHAT)
            rest.begin(watch)
            self.rest = rest

    def confirm(self) -> None:
        """Accept it: only the ranks write to a generation, and they are loading it."""

    def mark_verified(self) -> None:
        """Have this node's supervisor bring it to the disk if an earlier run sealed it, or nodes
        have gone since: nobody else hears from the ranks where the shares are by now. What was in
        memory is not marked; it was not hashed."""
        if self._own is None or self._own.settled:
            return
        seal, others = self._own.seal, tuple(self._others)
        here = next(one for one in self._shares if one.first == seal.ranks.start)
        if (seal.share, seal.others) != (here, others):
            self._own.generation.note_places(seal.attempt, here, others)

    def close(self) -> None:
        """Let go of it, and remove what was brought."""
        self._links.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        remove_tree(self.path)

    def _describe(self) -> list[FileEntry]:
        """Return the other nodes' files; the seal then has those of all nodes."""
        files: list[FileEntry] = []
        header: MemorySeal | None = self._own.seal if self._own is not None else None
        for share in self._others:
            with self._links.lent(share) as node:
                seal = node.describe(self.ref.attempt)
            files += seal.files
            self._holders.update((entry.path, share) for entry in seal.files)
            header = header or seal
        if header is None:
            raise CheckpointRejected("no node has it")
        own = self._own.seal.files if self._own is not None else []
        self.seal = make_memory_seal(header, [*own, *files])
        return [_with_chunks(entry) for entry in files]

    def _link_own(self) -> None:
        if self._own is None:
            return
        for entry in self._own.seal.files:
            target = self.path / entry.path
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):  # another rank of this node was faster
                os.link(self._own.generation.path / entry.path, target, follow_symlinks=False)

    def _bring(self, here: LocalChunks, entries: Sequence[FileEntry], watch: Watch) -> None:
        for entry in entries:
            here.make(entry)
        pieces = [
            Chunk(one.path, begin, min(PIECE_BYTES, one.bytes - begin), "")
            for one in entries
            for begin in range(0, one.bytes, PIECE_BYTES)
        ]
        here.bring(pieces, watch(_WHAT, sum(entry.bytes for entry in entries)))

    def _fetch(self, chunk: Chunk) -> memoryview:
        data = memoryview(bytearray(chunk.bytes))
        with self._links.lent(self._holders[chunk.path]) as node:
            node.fetch(self.ref.attempt, chunk.path, chunk.begin, data)
        return data


class _SharesRest(ChunkRest):
    """The chunks that a node's ranks want of the other nodes' files."""

    def want(self, ranges: Ranges | None) -> None:
        with _refusing():
            super().want(ranges)

    def bring(self, watch: Watch) -> None:
        with _refusing():
            super().bring(watch)

    def _bring(self, chunks: list[Chunk], watch: Watch) -> None:
        total, room = sum(chunk.bytes for chunk in chunks) * self._of, room_bytes(self._directory)
        if total > room:
            raise CheckpointRejected(
                f"{human_bytes(total)} of other nodes do not fit into {human_bytes(room)} of memory"
            )
        super()._bring(chunks, watch)


@contextmanager
def _refusing() -> Iterator[None]:
    """Have the checkpoint refused if a node is gone or this one's memory fails: it is a copy, and
    an older one or the disk has the job go on."""
    try:
        yield
    except NodeLost as error:
        raise CheckpointRejected(f"a part of it is gone: {error}") from None
    except OSError as error:
        raise CheckpointRejected(f"it cannot be brought here: {error}") from None


class _Links:
    """Connections to other nodes, each lent to one thread at a time."""

    def __init__(self) -> None:
        self._free: dict[Share, queue.SimpleQueue[NodeMemory]] = {}

    @contextmanager
    def lent(self, share: Share) -> Iterator[NodeMemory]:
        """Lend a connection; one that has failed is not lent again."""
        free = self._free.setdefault(share, queue.SimpleQueue())
        try:
            node = free.get_nowait()
        except queue.Empty:
            node = NodeMemory(share)
        try:
            yield node
        except BaseException:
            node.close()
            raise
        free.put(node)

    def close(self) -> None:
        for free in self._free.values():
            while not free.empty():
                free.get().close()


def _with_chunks(entry: FileEntry) -> FileEntry:
    """Cut a large file; the node that has it takes the digests."""
    count = -(-entry.bytes // CHUNK_BYTES)
    return msgspec.structs.replace(entry, chunks=("",) * count if count > 1 else ())


def can_load(header: SealHeader, world_size: int) -> bool:
    """Return whether this number of ranks can load a checkpoint from memory."""
    return header.world_size == world_size or header.engine.name in RESHARDING


def brought(root: Path) -> Path:
    """Return where a node's tier has what was brought for a load."""
    return root / "brought"


def clear_brought(root: Path) -> None:
    """Remove what a load that was killed has left: its second names keep files from being written
    again."""
    remove_tree(brought(root))
