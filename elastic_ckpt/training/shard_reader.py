"""Tensors from the files of an index: each rank reads what it needs, at its offset."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from elastic_ckpt.training.tensors.shard_index import (
    IndexedTensor,
    Shard,
    ShardIndex,
    check_files,
    read_index,
)
from elastic_ckpt.training.tensors.state_codec import rejecting
from elastic_ckpt.training.tensors.safetensors_file import NAMED_DTYPES, TensorFile


class ShardReader:
    """The tensors of one part, open for reading. Not collective. A context manager.

    Raises:
        CheckpointRejected: index and files are not what :func:`read_index` and
            :func:`check_files` ask for.
        OSError: they cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, TensorFile] = {}
        self.index: ShardIndex = read_index(directory)
        try:
            check_files(directory, self.index, self._files)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, wanted: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Fill tensors in place; of a DTensor, the shard that this rank holds.

        Args:
            wanted: name in the index and target, of the indexed dtype and global shape, on any
                device.
        """
        targets = {str(number): target.detach() for number, (_, target) in enumerate(wanted)}
        entries = {str(number): self.index.tensors[name] for number, (name, _) in enumerate(wanted)}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(targets, Metadata(dict(map(_described, entries.items()))))
        with rejecting(f"a file in {self._directory.name}"):
            for item in planner.create_local_plan().items:
                shard = entries[item.storage_index.fqn].shards[item.storage_index.index or 0]
                target = planner.resolve_tensor(item)
                self._copy(shard, tuple(item.storage_offsets), target)

    def _copy(self, shard: Shard, offsets: Sequence[int], target: torch.Tensor) -> None:
        """Fill ``target`` with the box of the shard that begins at ``offsets``."""
        file = self._files[shard.file]
        stored = file.tensors[shard.name]
        row = prod(shard.sizes[1:]) * stored.dtype.itemsize
        begin = stored.begin + (offsets[0] * row if offsets else 0)
        if list(target.shape[1:]) == shard.sizes[1:]:
            if target.is_cpu and target.is_contiguous():
                file.read_into(begin, target)
                return
            rows = torch.empty(target.shape, dtype=stored.dtype)
        else:  # the boxes differ beyond the first dimension: whole rows, and what is wanted of them
            rows = torch.empty((target.shape[0], *shard.sizes[1:]), dtype=stored.dtype)
        file.read_into(begin, rows)
        for dimension in range(1, target.dim()):
            rows = rows.narrow(dimension, offsets[dimension], target.shape[dimension])
        target.copy_(rows)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _described(item: tuple[str, IndexedTensor]) -> tuple[str, Any]:
    """An entry as torch's planner knows it."""
    name, entry = item
    return name, TensorStorageMetadata(
        properties=TensorProperties(dtype=NAMED_DTYPES[entry.dtype]),
        size=torch.Size(entry.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.sizes))
            for shard in entry.shards
        ],
    )
