"""``index.json``: which bytes of which file make up each tensor of a part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from elastic_ckpt.util.text import printable
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.training.tensors.state_codec import rejecting
from elastic_ckpt.training.tensors.safetensors_file import NAMED_DTYPES, TensorFile

INDEX_NAME: Final = "index.json"

MAX_INDEX_BYTES: Final = 256 * 1024 * 1024
MAX_DIMENSIONS: Final = 64
MAX_ELEMENTS: Final = 2**60
MAX_SHARDS: Final = 16_384
"""Of one tensor: each is compared with all others."""

_FILE: Final = re.compile(r"[0-9]{5,10}\.safetensors")


class Shard(msgspec.Struct, frozen=True):
    """A box of a tensor: ``sizes`` elements from ``offsets`` on, called ``name`` in ``file``."""

    file: str
    name: str
    offsets: list[int]
    sizes: list[int]


class IndexedTensor(msgspec.Struct, frozen=True):
    """A whole tensor; ``dtype`` as safetensors calls it. One without elements has no shards."""

    dtype: str
    shape: list[int]
    shards: list[Shard]


class ShardIndex(msgspec.Struct, frozen=True):
    """The tensors of one part by name."""

    tensors: dict[str, IndexedTensor]


def shard_file(rank: int) -> str:
    """The file of a rank's shards, beside the index."""
    return f"{rank:05d}.safetensors"


def read_index(directory: Path) -> ShardIndex:
    """The index of a part, whose shards are in its files and cover each tensor once.

    Raises:
        CheckpointRejected: it is anything else.
    """
    with rejecting(f"{INDEX_NAME} in {directory.name}"):
        data = read_bounded(directory / INDEX_NAME, MAX_INDEX_BYTES)
        index = msgspec.json.decode(data, type=ShardIndex)
        for name, tensor in index.tensors.items():
            wrong = what_is_wrong(tensor)
            if wrong:
                raise ValueError(f"{printable(name, 80)}: {wrong}")
    return index


def what_is_wrong(tensor: IndexedTensor) -> str:
    """Why an entry describes no tensor; empty if it does."""
    shape = tensor.shape
    if tensor.dtype not in NAMED_DTYPES:
        return "its dtype is unknown"
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or prod(shape) > MAX_ELEMENTS:
        return "its shape is no tensor's"
    if len(tensor.shards) > MAX_SHARDS:
        return f"it has more than {MAX_SHARDS} shards"
    if not all(_FILE.fullmatch(shard.file) for shard in tensor.shards):
        return "a shard is in no file of this part"
    return _cover_fault(shape, tensor.shards)


def _cover_fault(shape: Sequence[int], shards: Sequence[Shard]) -> str:
    for shard in shards:
        if len(shard.offsets) != len(shape) or len(shard.sizes) != len(shape):
            return "a shard has another number of dimensions"
        if min((*shard.offsets, *shard.sizes), default=0) < 0 or any(
            offset + size > length
            for offset, size, length in zip(shard.offsets, shard.sizes, shape, strict=True)
        ):
            return "a shard lies outside of it"
    if sum(prod(shard.sizes) for shard in shards) != prod(shape):
        return "its shards do not cover it once"
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
    """Open every file that an index names, into ``files``, and look whether it holds the shards.

    Raises:
        CheckpointRejected: a shard is not there, or has another dtype or shape.
        OSError: a file cannot be read.
    """
    with rejecting(f"{INDEX_NAME} in {directory.name}"):
        for name, tensor in index.tensors.items():
            for shard in tensor.shards:
                if shard.file not in files:
                    files[shard.file] = TensorFile(directory / shard.file)
                stored = files[shard.file].tensors.get(shard.name)
                wanted = (NAMED_DTYPES[tensor.dtype], tuple(shard.sizes))
                if stored is None or (stored.dtype, stored.shape) != wanted:
                    raise CheckpointRejected(f"{printable(name, 80)} is not in {shard.file}")
