"""Every node copies its own share to the disk, at the same time; the head's drain leads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from elastic_ckpt.checkpoint.manifest import FileEntry, Share
from elastic_ckpt.checkpoint.memory.drain import Copying, copy_share
from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.nodes.client import NodeMemory
from elastic_ckpt.checkpoint.tier import Attempt, Ref


class _OtherCopy:
    """The copy of another node's share."""

    def __init__(self, share: Share, attempt: str, target: Ref) -> None:
        self._node = NodeMemory(share)
        self._attempt = attempt
        self._target = target
        self.files: list[FileEntry] | None = None

    def go_on(self) -> None:
        self.files = self._node.copy(self._attempt, self._target).files

    def close(self) -> None:
        self._node.close()


def copy_shares(sealed: Sealed, attempt: Attempt) -> Copying:
    """Copy this node's share of a checkpoint, and have the others copy theirs, a piece each at a
    time: so a pause of this generator is one for all of them, and its end is.

    Raises:
        NodeLost: another node does not answer.
        CheckpointRejected: it does not have its share, or cannot copy it.
        OSError: the storage failed.
    """
    with ExitStack() as held:
        shares = sealed.seal.others
        pool = held.enter_context(ThreadPoolExecutor(len(shares), "shares"))
        others = [_OtherCopy(one, sealed.seal.attempt, attempt.ref) for one in shares]
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
