"""``index.json``: which parts of which files make up each tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.training.tensors.safetensors_file import NAMED_DTYPES, TensorFile
from elastic_ckpt.training.tensors.state_codec import rejecting
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.util.text import printable

INDEX_NAME: Final = "index.json"

MAX_INDEX_BYTES: Final = 256 * 1024 * 1024
MAX_DIMENSIONS: Final = 64
MAX_ELEMENTS: Final = 2**60
MAX_SHARDS: Final = 16_384
"""The maximum per tensor, as each shard is compared with all others."""

Range = tuple[int, int]
"""From a byte of a file, and up to one."""

_FILE: Final = re.compile(r"[0-9]{5,10}\.safetensors")


class Shard(msgspec.Struct, frozen=True):
    """A box of a tensor: ``sizes`` elements from ``offsets`` on, with this ``name`` in ``file``."""

    file: str
    name: str
    offsets: list[int]
    sizes: list[int]


class IndexedTensor(msgspec.Struct, frozen=True):
    """A whole tensor, with safetensors' name of its dtype. Without elements it has no shards."""

    dtype: str
    shape: list[int]
    shards: list[Shard]


class ShardIndex(msgspec.Struct, frozen=True):
    """The tensors of one part by name."""

    tensors: dict[str, IndexedTensor]


def shard_file(rank: int) -> str:
    """Return the name of a rank's file, next to the index."""
    return f"{rank:05d}.safetensors"


def read_index(directory: Path) -> ShardIndex:
    """Read a part's index; CheckpointRejected unless its shards cover each tensor exactly once."""
    with rejecting(f"{INDEX_NAME} in {directory.name}"):
        data = read_bounded(directory / INDEX_NAME, MAX_INDEX_BYTES)
        index = msgspec.json.decode(data, type=ShardIndex)
        for name, tensor in index.tensors.items():
            wrong = what_is_wrong(tensor)
            if wrong:
                raise ValueError(f"{printable(name, 80)}: {wrong}")
    return index


def what_is_wrong(tensor: IndexedTensor) -> str:
    """Return why an entry is invalid; empty if it is valid."""
    shape = tensor.shape
    if tensor.dtype not in NAMED_DTYPES:
        return "its dtype is unknown"
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or prod(shape) > MAX_ELEMENTS:
        return "its shape is invalid"
    if len(tensor.shards) > MAX_SHARDS:
        return f"it has more than {MAX_SHARDS} shards"
    if not all(_FILE.fullmatch(shard.file) for shard in tensor.shards):
        return "a shard is not in a file of this part"
    return _cover_fault(shape, tensor.shards)


def _cover_fault(shape: Sequence[int], shards: Sequence[Shard]) -> str:
    for shard in shards:
        if len(shard.offsets) != len(shape) or len(shard.sizes) != len(shape):
            return "a shard has another number of dimensions"
        if min((*shard.offsets, *shard.sizes), default=0) < 0 or any(
            offset + size > length
            for offset, size, length in zip(shard.offsets, shard.sizes, shape, strict=True)
        ):
            return "a shard lies outside it"
    if sum(prod(shard.sizes) for shard in shards) != prod(shape):
        return "its shards do not cover it exactly once"
    if len(shards) > 1 and _overlap(shards):
        return "two of its shards overlap"
    return ""


def _overlap(shards: Sequence[Shard]) -> bool:
    begin = np.array([shard.offsets for shard in shards], dtype=np.int64)
    end = begin + np.array([shard.sizes for shard in shards], dtype=np.int64)
    return any(
        bool(((begin[i] < end[i + 1 :]) & (begin[i + 1 :] < end[i])).all(axis=1).any())
        for i in range(len(shards) - 1)
    )


def check_files(directory: Path, index: ShardIndex, files: dict[str, TensorFile]) -> None:
    """Open every file that an index names, into ``files``. CheckpointRejected if a shard is missing
    or has another dtype or shape, OSError if a file cannot be read."""
    with rejecting(f"{INDEX_NAME} in {directory.name}"):
        for name, tensor in index.tensors.items():
            for shard in tensor.shards:
                if shard.file not in files:
                    files[shard.file] = TensorFile(directory / shard.file)
                stored = files[shard.file].tensors.get(shard.name)
                wanted = (NAMED_DTYPES[tensor.dtype], tuple(shard.sizes))
                if stored is None or (stored.dtype, stored.shape) != wanted:
                    raise CheckpointRejected(f"{printable(name, 80)} is not in {shard.file}")


class ShardReader:
    """The tensors of one part, open for reading. Not collective. A context manager. Opening raises
    as :func:`read_index` and :func:`check_files`."""

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
        """Fill targets on any device, by names in the index, with its dtype and global shape; for a
        DTensor, this rank's shard."""
        with rejecting(f"a file in {self._directory.name}"):
            for planner, item, shard in self._plan(wanted):
                self._copy(shard, tuple(item.storage_offsets), planner.resolve_tensor(item))

    def ranges(self, wanted: Sequence[tuple[str, torch.Tensor]]) -> dict[str, list[Range]]:
        """Return the bytes that :meth:`read` will read, by file."""
        found: dict[str, list[Range]] = {name: [] for name in self._files}
        with rejecting(f"{INDEX_NAME} in {self._directory.name}"):
            for _, item, shard in self._plan(wanted):
                begin, row = self._place(shard, tuple(item.storage_offsets))
                found[shard.file].append((begin, begin + prod(tuple(item.lengths)[:1]) * row))
        return found

    def _plan(
        self, wanted: Sequence[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[DefaultLoadPlanner, Any, Shard]]:
        """Yield what torch's planner reads from each shard, and the planner."""
        targets = {str(number): target.detach() for number, (_, target) in enumerate(wanted)}
        entries = {str(number): self.index.tensors[name] for number, (name, _) in enumerate(wanted)}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(targets, Metadata(dict(map(_described, entries.items()))))
        for item in planner.create_local_plan().items:
            index = item.storage_index
            yield planner, item, entries[index.fqn].shards[index.index or 0]

    def _place(self, shard: Shard, offsets: Sequence[int]) -> tuple[int, int]:
        """Return where in its file the row of a box's first element begins, and a row's bytes."""
        stored = self._files[shard.file].tensors[shard.name]
        row = prod(shard.sizes[1:]) * stored.dtype.itemsize
        return stored.begin + (offsets[0] * row if offsets else 0), row

    def _copy(self, shard: Shard, offsets: Sequence[int], target: torch.Tensor) -> None:
        """Fill ``target`` from the box of the shard that begins at ``offsets``."""
        file = self._files[shard.file]
        stored = file.tensors[shard.name]
        begin, _ = self._place(shard, offsets)
        if list(target.shape[1:]) == shard.sizes[1:]:
            if target.is_cpu and target.is_contiguous():
                file.read_into(begin, target)
                return
            rows = torch.empty(target.shape, dtype=stored.dtype)
        else:  # the boxes differ in other dimensions: read whole rows, then narrow them
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
    """Convert an entry for torch's planner."""
    name, entry = item
    return name, TensorStorageMetadata(
        properties=TensorProperties(dtype=NAMED_DTYPES[entry.dtype]),
        size=torch.Size(entry.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.sizes))
            for shard in entry.shards
        ],
    )
