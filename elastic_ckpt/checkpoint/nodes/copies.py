"""Every node copies its own share to the disk, at the same time; the head's drain leads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import msgspec

from elastic_ckpt.checkpoint.manifest import FileEntry
from elastic_ckpt.checkpoint.memory.drain import Copying, copy_share
from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.memory.seal import MemorySeal, Share
from elastic_ckpt.checkpoint.nodes.client import NodeMemory
from elastic_ckpt.checkpoint.nodes.pairs import guarded_by
from elastic_ckpt.checkpoint.tier import Attempt, Ref
from elastic_ckpt.errors import NodeLost


class _OtherCopy:
    """The copy of another node's share: by that node or, if it is gone, from a replica."""

    def __init__(self, holders: Sequence[Share], attempt: str, target: Ref) -> None:
        self._nodes = [NodeMemory(one) for one in holders]
        self._attempt = attempt
        self._target = target
        self._has_begun = False
        self.files: list[FileEntry] | None = None

    def go_on(self) -> None:
        while True:
            try:
                self.files = self._nodes[0].copy(self._attempt, self._target).files
                self._has_begun = True
                return
            except NodeLost:
                # What it has written stays in the attempt, which the next drain begins anew.
                if self._has_begun or len(self._nodes) == 1:
                    raise
                self._nodes.pop(0).close()

    def close(self) -> None:
        for node in self._nodes:
            node.close()


def holders(share: Share, seal: MemorySeal) -> list[Share]:
    """Return the nodes that have another node's share, itself first, as the leader's seal says."""
    own = [seal.share] if seal.share is not None else []
    nodes = [*own, *seal.others]
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
        pool = held.enter_context(ThreadPoolExecutor(len(seal.others), "shares"))
        others = [_OtherCopy(holders(one, seal), seal.attempt, attempt.ref) for one in seal.others]
        for one in others:
            held.callback(one.close)
        own: Copying | None = copy_share(sealed, attempt)
        files: list[FileEntry] = []
        while own is not None or any(one.files is None for one in others):
            going = [pool.submit(one.go_on) for one in others if one.files is None]
            count = 0
            try:
                count = next(own) if own is not None else 0
            except StopIteration as done:
                own, files = None, done.value
            for piece in going:
                piece.result()
            yield count
        return [*files, *(entry for one in others for entry in one.files or [])]
