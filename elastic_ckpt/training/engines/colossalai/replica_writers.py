"""Which replica writes which file of a save that each of them could make alone."""

from __future__ import annotations

import os
from typing import Any, Final

from torch import distributed

from elastic_ckpt.errors import SaveFailed

SHARED_FROM_BYTES: Final = 1024 * 1024
"""Rank 0 writes smaller files: sharing them gains less than the replicas' differences cost."""

dist: Any = distributed
"""Its object collectives are public, but untyped."""


class ReplicaWriters:
    """Assigns each file to one of the first ``writers`` ranks, see :func:`count_writers`. Each rank
    decides by itself, and all alike, as they ask in the same order about files of the same sizes;
    :meth:`compare` checks that."""

    def __init__(self, rank: int, writers: int) -> None:
        self._rank = rank
        self._taken = [0] * writers
        self._files: list[tuple[str, int]] = []

    @property
    def has_part(self) -> bool:
        """Whether this rank writes any file."""
        return self._rank < len(self._taken)

    def takes(self, path: str, size: int, *, shared: bool = True) -> bool:
        """Return whether this rank writes the next file; the one with the fewest bytes of tensors
        does. One whose values may differ between replicas is not ``shared``: rank 0 writes its
        own."""
        writer = 0
        if shared and size >= SHARED_FROM_BYTES:
            writer = self._taken.index(min(self._taken))
        self._taken[writer] += size
        self._files.append((path, size))
        return writer == self._rank

    def compare(self, *, failed: bool = False) -> None:
        """Raise SaveFailed if the replicas saw different files. Collective; the others learn
        elsewhere that a rank has ``failed``."""
        mine = None if failed else self._files
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.has_part, mine))
        if any(files is None for _, files in everyone):
            return
        for rank, (writes, files) in enumerate(everyone):
            if writes and files != everyone[0][1]:
                raise SaveFailed(rank, "its replica has other files than rank 0's")


def count_writers() -> int:
    """Return the number of ranks on rank 0's node; 0 on other nodes. Rank 0 writes alone if the
    launcher does not tell which node is the first, unless there is only one."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local == dist.get_world_size() or os.environ.get("GROUP_RANK") == "0":
        return local
    return 0 if "GROUP_RANK" in os.environ else 1
