"""``index.json``: which parts of which files make up each tensor.

A tensor of few shards lists them. With thousands of ranks nearly all tensors are cut in the same
few ways, by the same ranks: those are listed once, and a tensor refers to them. The index of 4,096
ranks of a model of 70 billion parameters has 1.2 MB; with a list for each tensor it had 900.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from elastic_ckpt.training.tensors.safetensors_file import METADATA_KEY, NAMED_DTYPES
from elastic_ckpt.training.tensors.state_codec import rejecting
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.util.text import printable

INDEX_NAME: Final = "index.json"

MAX_INDEX_BYTES: Final = 256 * 1024 * 1024
MAX_DIMENSIONS: Final = 64
MAX_ELEMENTS: Final = 2**60
MAX_SHARDS: Final = 16_384
"""The maximum per tensor, as those that form no grid are each compared with all others."""

_FILE: Final = re.compile(r"[0-9]{5,10}\.safetensors")
_MAX_RANK: Final = 10**10 - 1


class Shard(msgspec.Struct, frozen=True):
    """A box of a tensor: ``sizes`` elements from ``offsets`` on, with this ``name`` in ``file``."""

    file: str
    name: str
    offsets: list[int]
    sizes: list[int]


class Cut(msgspec.Struct, frozen=True):
    """A way to cut a shape: each box's first element, and its own shape."""

    offsets: list[list[int]]
    sizes: list[list[int]]


class IndexedTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """A whole tensor, with safetensors' name of its dtype.

    Attributes:
        shards: in any order; without elements there are none. None if the next two say it:
        cut, ranks: the numbers, in the index, of how it is cut and of which ranks wrote the boxes.
    """

    dtype: str
    shape: list[int]
    shards: list[Shard] | None = None
    cut: int | None = None
    ranks: int | None = None


class ShardIndex(msgspec.Struct, frozen=True, omit_defaults=True):
    """The tensors of one part by name; ``cuts`` and ``ranks`` are what they refer to."""

    tensors: dict[str, IndexedTensor]
    cuts: list[Cut] = []
    ranks: list[list[int]] = []

    def files(self) -> list[str]:
        """Return the names of all files that hold a shard."""
        listed = (shard.file for one in self.tensors.values() for shard in one.shards or [])
        shared = {rank for ranks in self.ranks for rank in ranks}
        return sorted({*listed, *map(shard_file, shared)})

    def boxes(self, name: str) -> tuple[list[list[int]], list[list[int]]]:
        """Return the offsets and the sizes of a tensor's shards."""
        tensor = self.tensors[name]
        if tensor.cut is not None:
            cut = self.cuts[tensor.cut]
            return cut.offsets, cut.sizes
        shards = tensor.shards or []
        return [shard.offsets for shard in shards], [shard.sizes for shard in shards]

    def shard(self, name: str, number: int) -> Shard:
        """Return one of a tensor's shards."""
        tensor = self.tensors[name]
        if tensor.cut is None or tensor.ranks is None:
            return (tensor.shards or [])[number]
        cut, rank = self.cuts[tensor.cut], self.ranks[tensor.ranks][number]
        offsets, sizes = cut.offsets[number], cut.sizes[number]
        inside = shard_name(name, offsets, is_whole=sizes == tensor.shape)
        return Shard(shard_file(rank), inside, offsets, sizes)


def shard_file(rank: int) -> str:
    """Return the name of a rank's file, next to the index."""
    return f"{rank:05d}.safetensors"


def shard_name(name: str, offsets: Sequence[int], *, is_whole: bool) -> str:
    """Return what a shard is called in its file."""
    return name if is_whole else f"{name}@{','.join(map(str, offsets))}"


def has_plain_name(name: str) -> bool:
    """Return whether no shard of another tensor, and no key of the format, can have the name that
    one of this tensor's has in its file."""
    return "@" not in name and name != METADATA_KEY


def read_index(directory: Path) -> ShardIndex:
    """Read a part's index; CheckpointRejected unless its shards cover each tensor exactly once."""
    with rejecting(f"{INDEX_NAME} in {directory.name}"):
        data = read_bounded(directory / INDEX_NAME, MAX_INDEX_BYTES)
        index = msgspec.json.decode(data, type=ShardIndex)
        wrong = what_is_wrong(index)
        if wrong:
            raise ValueError(wrong)
    return index


def what_is_wrong(index: ShardIndex) -> str:
    """Return which entry is invalid, and why; empty if all are valid."""
    references = _References(index)
    for name, tensor in index.tensors.items():
        wrong = _entry_fault(tensor, references)
        if wrong:
            return f"{printable(name, 80)}: {wrong}"
    return ""


class _References:
    """What an index's tensors refer to; thousands refer to the same, which is looked at once."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self.fault = functools.cache(self._fault)
        self.cover_fault = functools.cache(self._cover_fault)
        self._overlaps = functools.cache(self._overlap)

    def _fault(self, cut: int, ranks: int | None) -> str:
        """Return what is wrong with a reference to how a tensor is cut and who wrote it."""
        index = self._index
        if not 0 <= cut < len(index.cuts):
            return "how it is cut is not in the index"
        if ranks is None or not 0 <= ranks < len(index.ranks):
            return "which ranks wrote it is not in the index"
        boxes, writers = index.cuts[cut], index.ranks[ranks]
        if not len(boxes.offsets) == len(boxes.sizes) == len(writers):
            return "its boxes and its ranks are not of one number"
        if len(writers) > MAX_SHARDS:
            return f"it has more than {MAX_SHARDS} shards"
        if min(writers, default=0) < 0 or max(writers, default=0) > _MAX_RANK:
            return "a shard is not in a file of this part"
        return ""

    def _cover_fault(self, cut: int, shape: tuple[int, ...]) -> str:
        boxes = self._index.cuts[cut]
        return _cover_fault(shape, boxes.offsets, boxes.sizes, lambda: self._overlaps(cut))

    def _overlap(self, cut: int) -> bool:
        return overlap(self._index.cuts[cut].offsets, self._index.cuts[cut].sizes)


def _entry_fault(tensor: IndexedTensor, references: _References) -> str:
    shape = tensor.shape
    if tensor.dtype not in NAMED_DTYPES:
        return "its dtype is unknown"
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or prod(shape) > MAX_ELEMENTS:
        return "its shape is invalid"
    if tensor.cut is not None:
        wrong = references.fault(tensor.cut, tensor.ranks)
        return wrong or references.cover_fault(tensor.cut, tuple(shape))
    shards = tensor.shards or []
    if len(shards) > MAX_SHARDS:
        return f"it has more than {MAX_SHARDS} shards"
    if not all(_FILE.fullmatch(shard.file) for shard in shards):
        return "a shard is not in a file of this part"
    offsets, sizes = [one.offsets for one in shards], [one.sizes for one in shards]
    return _cover_fault(shape, offsets, sizes, lambda: overlap(offsets, sizes))


def _cover_fault(
    shape: Sequence[int],
    offsets: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[int]],
    overlaps: Callable[[], bool],
) -> str:
    if any(len(row) != len(shape) for rows in (offsets, sizes) for row in rows):
        return "a shard has another number of dimensions"
    try:
        begin, size = as_array(offsets), as_array(sizes)
    except OverflowError:
        return "a shard lies outside it"
    length = np.array(shape, dtype=np.int64)
    if len(begin) and ((begin < 0) | (size < 0) | (begin > length - size)).any():
        return "a shard lies outside it"
    if sum(map(prod, sizes)) != prod(shape):  # of any size, as an array's numbers are not
        return "its shards do not cover it exactly once"
    if len(sizes) > 1 and overlaps():
        return "two of its shards overlap"
    return ""


def overlap(offsets: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> bool:
    """Return whether two boxes, of at least two in all, have an element in common."""
    begin, size = as_array(offsets), as_array(sizes)
    filled = (size > 0).all(axis=1)
    begin, end = begin[filled], (begin + size)[filled]
    if _is_grid(begin, end):
        return False
    return any(
        bool(((begin[i] < end[i + 1 :]) & (begin[i + 1 :] < end[i])).all(axis=1).any())
        for i in range(len(begin) - 1)
    )


def _is_grid(begin: Any, end: Any) -> bool:
    """Return whether the boxes are different cells of a grid, and so have no element in common: in
    each dimension two of them have the same interval, or separate ones."""
    places = np.zeros(begin.shape, dtype=np.int64)
    for dimension in range(begin.shape[1]):
        both = np.stack([begin[:, dimension], end[:, dimension]], axis=1)
        intervals, place = np.unique(both, axis=0, return_inverse=True)
        if (intervals[1:, 0] < intervals[:-1, 1]).any():
            return False
        places[:, dimension] = place.reshape(-1)
    return len(np.unique(places, axis=0)) == len(places)


def as_array(rows: Sequence[Sequence[int]]) -> Any:
    """Return rows of the same length as an array."""
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1 if rows else 0)
