"""Reads tensors, or this rank's shards of them, from whatever shards they were written in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.training.tensors.local_box import TensorBox, local_boxes
from elastic_ckpt.training.tensors.safetensors_file import (
    NAMED_DTYPES,
    StoredTensor,
    TensorFile,
)
from elastic_ckpt.training.tensors.shard_index import (
    INDEX_NAME,
    Shard,
    ShardIndex,
    as_array,
    read_index,
)
from elastic_ckpt.training.tensors.state_codec import rejecting
from elastic_ckpt.util.text import printable

Range = tuple[int, int]
"""From a byte of a file, and up to one."""


@dataclass(frozen=True)
class _Read:
    """What is read of one shard: the box at ``offsets`` in it, into ``target``."""

    shard: Shard
    stored: StoredTensor
    offsets: list[int]
    target: torch.Tensor

    @property
    def row_bytes(self) -> int:
        """The size of a row of the shard."""
        return prod(self.shard.sizes[1:]) * self.stored.dtype.itemsize

    @property
    def begin(self) -> int:
        """Where in the file the row of the box's first element begins."""
        return self.stored.begin + (self.offsets[0] * self.row_bytes if self.offsets else 0)


class ShardReader:
    """The tensors of one part, open for reading. Not collective. A context manager. Opening raises
    as :func:`read_index`; a file is opened when something is to be read from it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, TensorFile] = {}
        self._arrays: dict[int, tuple[Any, Any]] = {}  # of cuts by their numbers
        self.index: ShardIndex = read_index(directory)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def check(self, wanted: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Open every file that :meth:`read` will read, and fill nothing yet. CheckpointRejected if
        a shard is missing or has another dtype or shape, OSError if a file cannot be read."""
        with rejecting(f"{INDEX_NAME} in {self._directory.name}"):
            for _ in self._plan(wanted):
                pass

    def read(self, wanted: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Fill targets on any device, by names in the index, with its dtype and global shape; for a
        DTensor, this rank's shard. Raises as :meth:`check`."""
        with rejecting(f"a file in {self._directory.name}"):
            for read in self._plan(wanted):
                self._copy(read)

    def ranges(self, wanted: Sequence[tuple[str, torch.Tensor]]) -> dict[str, list[Range]]:
        """Return the bytes that :meth:`read` will read, by file; raises as :meth:`check`."""
        with rejecting(f"{INDEX_NAME} in {self._directory.name}"):
            found: dict[str, list[Range]] = {name: [] for name in self.index.files()}
            for read in self._plan(wanted):
                rows = read.target.shape[0] if read.target.dim() else 1
                found[read.shard.file].append((read.begin, read.begin + rows * read.row_bytes))
        return found

    def _plan(self, wanted: Sequence[tuple[str, torch.Tensor]]) -> Iterator[_Read]:
        """Yield what to read from each shard that a target crosses."""
        targets = {str(number): target.detach() for number, (_, target) in enumerate(wanted)}
        boxes = local_boxes(targets)
        for number, (name, target) in enumerate(wanted):
            if list(target.shape) != self.index.tensors[name].shape:
                raise CheckpointRejected(f"{printable(name, 80)} has another shape than is wanted")
            box, whole = boxes.get(str(number)), targets[str(number)]
            if box is not None and 0 not in box.sizes:
                local = whole.to_local() if isinstance(whole, DTensor) else whole
                yield from self._crossing(name, box, local)

    def _crossing(self, name: str, box: TensorBox, local: torch.Tensor) -> Iterator[_Read]:
        begin, end = self._bounds(name)
        low = as_array([box.offsets])[0]
        high = low + as_array([box.sizes])[0]
        for number in ((begin < high) & (low < end)).all(axis=1).nonzero()[0].tolist():
            shard = self.index.shard(name, number)
            offsets, target = [], local
            for dimension, (mine, first, size) in enumerate(
                zip(box.offsets, shard.offsets, shard.sizes, strict=True)
            ):
                at = max(mine, first)
                count = min(mine + box.sizes[dimension], first + size) - at
                offsets.append(at - first)
                target = target.narrow(dimension, at - mine, count)
            if target.numel():
                yield _Read(shard, self._stored(name, shard), offsets, target)

    def _bounds(self, name: str) -> tuple[Any, Any]:
        """Return where each of a tensor's boxes begins and ends."""
        cut = self.index.tensors[name].cut
        if cut is None or cut not in self._arrays:
            offsets, sizes = map(as_array, self.index.boxes(name))
            if cut is None:
                return offsets, offsets + sizes
            self._arrays[cut] = offsets, offsets + sizes
        return self._arrays[cut]

    def _stored(self, name: str, shard: Shard) -> StoredTensor:
        """Return where a shard lies in its file."""
        if shard.file not in self._files:
            self._files[shard.file] = TensorFile(self._directory / shard.file)
        stored = self._files[shard.file].tensors.get(shard.name)
        dtype = NAMED_DTYPES[self.index.tensors[name].dtype]
        if stored is None or (stored.dtype, stored.shape) != (dtype, tuple(shard.sizes)):
            raise CheckpointRejected(f"{printable(name, 80)} is not in {shard.file}")
        return stored

    def _copy(self, read: _Read) -> None:
        file, target, sizes = self._files[read.shard.file], read.target, read.shard.sizes
        if list(target.shape[1:]) == sizes[1:]:
            if target.is_cpu and target.is_contiguous():
                file.read_into(read.begin, target)
                return
            rows = torch.empty(target.shape, dtype=read.stored.dtype)
        else:  # the boxes differ in other dimensions: read whole rows, then narrow them
            rows = torch.empty((target.shape[0], *sizes[1:]), dtype=read.stored.dtype)
        file.read_into(read.begin, rows)
        for dimension in range(1, target.dim()):
            rows = rows.narrow(dimension, read.offsets[dimension], target.shape[dimension])
        target.copy_(rows)
