"""Every node copies its own share to the disk, at the same time; the head's drain leads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import msgspec

from elastic_ckpt.checkpoint.manifest import FileEntry
from elastic_ckpt.checkpoint.memory.drain import Copying, copy_share
from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.memory.seal import MemorySeal, Share
from elastic_ckpt.checkpoint.nodes.client import NodeMemory
from elastic_ckpt.checkpoint.nodes.pairs import guarded_by
from elastic_ckpt.checkpoint.tier import Attempt, Ref
from elastic_ckpt.errors import CheckpointRejected, ElasticCkptError, NodeLost


class _OtherCopy:
    """The copy of another node's share: by that node or, if it is gone, from a replica."""

    def __init__(self, holders: Sequence[Share], attempt: str, target: Ref) -> None:
        self._nodes = [NodeMemory(one) for one in holders]
        self._attempt = attempt
        self._target = target
        self._has_begun = False
        self._lost: NodeLost | None = None
        self.files: list[FileEntry] | None = None

    def ask(self) -> None:
        """Have the next piece copied; :meth:`take` tells what came of it."""
        self._lost = None
        try:
            self._nodes[0].begin_copy(self._attempt, self._target)
            self._has_begun = True
        except NodeLost as lost:
            self._lost = lost

    def take(self) -> ElasticCkptError | None:
        """Wait until that piece is copied; return why it cannot be."""
        while True:
            try:
                if self._lost is not None:
                    raise self._lost
                self.files = self._nodes[0].copied().files
                return None
            except CheckpointRejected as refused:
                return refused
            except NodeLost as lost:
                # What it has written stays in the attempt, which the next drain begins anew.
                if self._has_begun or len(self._nodes) == 1:
                    return lost
                self._nodes.pop(0).close()
                self.ask()

    def close(self) -> None:
        for node in self._nodes:
            node.close()


def holders(share: Share, seal: MemorySeal) -> list[Share]:
    """Return the nodes that have another node's share, itself first, as the leader's seal says."""
    if share.leaves:
        return [share]  # by now it is where another node keeps it
    own = [seal.share] if seal.share is not None else []
    nodes = [one for one in (*own, *seal.others) if not one.leaves]
    guards = [one for one in nodes if share in guarded_by(one, nodes, len(seal.guards))]
    replicas = [
        msgspec.structs.replace(one, first=share.first, count=share.count) for one in guards
    ]
    return [share, *replicas]


def copy_shares(sealed: Sealed, attempt: Attempt) -> Copying:
    """Copy this node's share of a checkpoint, and have the others copy theirs, a piece each at a
    time: so a pause of this generator is one for all of them, and its end is.

    Raises:
        NodeLost: another node does not answer.
        CheckpointRejected: it does not have its share, or cannot copy it.
        OSError: the storage failed.
    """
    with ExitStack() as held:
        seal = sealed.seal
        others = [_OtherCopy(holders(one, seal), seal.attempt, attempt.ref) for one in seal.others]
        for one in others:
            held.callback(one.close)
        own: Copying | None = copy_share(sealed, attempt)
        files: list[FileEntry] = []
        while own is not None or any(one.files is None for one in others):
            count, done = _copy_piece(own, [one for one in others if one.files is None])
            if done is not None:
                own, files = None, done
            yield count
        return [*files, *(entry for one in others for entry in one.files or [])]


def _copy_piece(
    own: Copying | None, others: Sequence[_OtherCopy]
) -> tuple[int, list[FileEntry] | None]:
    """Copy a piece on each node; return the bytes of this one's, and its files with the last. Ends
    once no node writes any more, also if one has failed: the attempt may be dropped then."""
    for one in others:
        one.ask()
    try:
        count, files = (next(own) if own is not None else 0), None
    except StopIteration as done:
        count, files = 0, done.value
    finally:
        failed = [error for one in others if (error := one.take()) is not None]
    if failed:
        raise failed[0]
    return count, files
