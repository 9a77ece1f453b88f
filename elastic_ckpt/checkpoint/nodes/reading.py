"""A checkpoint in the memory of several nodes, brought together on one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from elastic_ckpt.checkpoint.manifest import (
    FileEntry,
    MemorySeal,
    SealHeader,
    Share,
    make_memory_seal,
)
from elastic_ckpt.checkpoint.memory.generation import Sealed, check_covers
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.nodes.client import PIECE_BYTES, NodeMemory
from elastic_ckpt.checkpoint.ownership.read_lock import ReadLock
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.checkpoint.verify import share_out
from elastic_ckpt.errors import CheckpointRejected, NodeLost
from elastic_ckpt.util.files import remove_tree
from elastic_ckpt.util.progress import Advance, Watch
from elastic_ckpt.util.units import human_bytes


class SharesReading:
    """See :class:`elastic_ckpt.checkpoint.tier.Reading`. The ranks of a node bring what the other
    nodes have, a part each; its own files appear beside that under a second name."""

    seal: MemorySeal

    def __init__(
        self, root: Path, ref: Ref, share: Share, own: Sealed | None, shares: Sequence[Share]
    ) -> None:
        """Keep this node's generation, if it has one of the attempt, from being overwritten."""
        self.ref = ref
        self.path = brought(root) / ref.attempt
        self._root = root
        self._share = share
        self._own = own
        self._others = [one for one in shares if own is None or one.first != own.seal.ranks.start]
        self._lock: ReadLock | None = own.generation.lock() if own is not None else None

    def verify(self, rank: int, world_size: int, watch: Watch) -> None:
        """Bring this rank's part of what the node lacks; each piece has the digest that its node
        took of its own memory. CheckpointRejected if a node is gone, or there is no room."""
        try:
            files = self._describe()
            if not can_load(self.seal, world_size):
                check_covers(self.seal, world_size)
            self._link_own()
            mine = share_out(
                [entry for entry, _ in files], rank - self._share.first, self._share.count
            )
            total = sum(entry.bytes for entry in mine)
            if total > room_bytes(self._root):
                raise CheckpointRejected(f"{human_bytes(total)} do not fit into memory")
            advance = watch("bringing a checkpoint from the other nodes' memory", total)
            for share in self._others:
                wanted = [entry for entry in mine if entry.rank in share.ranks]
                with NodeMemory(share) as node:
                    for entry in wanted:
                        self._bring(node, entry, advance)
        except NodeLost as error:
            raise CheckpointRejected(f"a part of it is gone: {error}") from None

    def confirm(self) -> None:
        """Accept it: only the ranks write to a generation, and they are loading it."""

    def mark_verified(self) -> None:
        """Do nothing: what was in this node's memory was not hashed."""

    def close(self) -> None:
        """Let go of it, and remove what was brought."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        remove_tree(self.path)

    def _describe(self) -> list[tuple[FileEntry, Share]]:
        """Return the other nodes' files; the seal then has those of all nodes."""
        files: list[tuple[FileEntry, Share]] = []
        header: MemorySeal | None = self._own.seal if self._own is not None else None
        for share in self._others:
            with NodeMemory(share) as node:
                seal = node.describe(self.ref.attempt)
            files += [(entry, share) for entry in seal.files]
            header = header or seal
        if header is None:
            raise CheckpointRejected("no node has it")
        own = self._own.seal.files if self._own is not None else []
        self.seal = make_memory_seal(header, [*own, *(entry for entry, _ in files)])
        return files

    def _link_own(self) -> None:
        for entry in self._own.seal.files if self._own is not None else []:
            target = self.path / entry.path
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            source = self._own.generation.path / entry.path if self._own is not None else target
            with suppress(FileExistsError):  # another rank of this node was faster
                os.link(source, target, follow_symlinks=False)

    def _bring(self, node: NodeMemory, entry: FileEntry, advance: Advance) -> None:
        target = self.path / entry.path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        buffer = bytearray(min(entry.bytes, PIECE_BYTES))
        with open(os.open(target, flags, 0o600), "wb", buffering=0) as file:
            for begin in range(0, entry.bytes, PIECE_BYTES):
                piece = memoryview(buffer)[: min(PIECE_BYTES, entry.bytes - begin)]
                node.fetch(self.ref.attempt, entry.path, begin, piece)
                while piece:
                    piece = piece[file.write(piece) :]
                advance(min(PIECE_BYTES, entry.bytes - begin))


def can_load(header: SealHeader, world_size: int) -> bool:
    """Return whether this number of ranks can load a checkpoint from memory."""
    return header.world_size == world_size or header.engine.name == "torch"


def brought(root: Path) -> Path:
    """Return where a node's tier has what was brought for a load."""
    return root / "brought"


def clear_brought(root: Path) -> None:
    """Remove what a load that was killed has left: its second names keep files from being written
    again."""
    remove_tree(brought(root))
