"""The files of a save: each rank's, and rank 0's index of each part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import torch

from elastic_ckpt.errors import SaveFailed
from elastic_ckpt.training.engines.torch.division import Assigned, Division
from elastic_ckpt.training.engines.torch.state import PartState
from elastic_ckpt.training.tensors.local_box import TensorBox
from elastic_ckpt.training.tensors.safetensors_file import (
    DTYPES,
    NAMED_DTYPES,
    Header,
    make_header,
)
from elastic_ckpt.training.tensors.shard_index import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    Cut,
    IndexedTensor,
    Shard,
    ShardIndex,
    has_plain_name,
    shard_file,
    shard_name,
    what_is_wrong,
)
from elastic_ckpt.util.text import printable

FEW_SHARDS: Final = 64
"""A tensor of more shards refers to a list of them in the index, which it shares with others."""


@dataclass(frozen=True)
class PlannedFile:
    """A file of this rank; ``names`` maps a tensor's name in the file to its own name."""

    part: str
    path: str
    header: Header
    names: Mapping[str, str]


def names_in_files(assigned: Mapping[str, Assigned]) -> dict[str, str]:
    """Return what each tensor's shards are called after: its name, or one that is free where a
    shard of another tensor could have the same one."""
    names: dict[str, str] = {}
    taken = set(assigned)
    for path in assigned:
        part, name = path.split("/", 1)
        found = name
        while not has_plain_name(name) and (found == name or f"{part}/{found}" in taken):
            found += "_"
        taken.add(f"{part}/{found}")
        names[path] = found
    return names


def files_of(
    assigned: Mapping[str, Assigned], names: Mapping[str, str], rank: int
) -> list[PlannedFile]:
    """Return the files of this rank."""
    layouts: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    inside: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for path, one in assigned.items():
        part, name = path.split("/", 1)
        for number in np.flatnonzero(one.writers == rank).tolist():
            box = one.division.boxes[number]
            stored = shard_name(names[path], box.offsets, is_whole=box.sizes == one.shape)
            layouts[part][stored] = (NAMED_DTYPES[one.dtype], box.sizes)
            inside[part][stored] = name
    file = shard_file(rank)
    return [
        PlannedFile(part, f"{part}/{file}", make_header(layouts[part]), inside[part])
        for part in sorted(layouts)
    ]


def indexes_of(
    assigned: Mapping[str, Assigned], names: Mapping[str, str], states: Mapping[str, PartState]
) -> dict[str, bytes]:
    """Return the index of each part, by path; an incomplete one fails the save."""
    indexes = {}
    lacking = assigned.keys() - {
        f"{part}/{name}" for part in states for name in states[part].tensors
    }
    if lacking:
        name = printable(min(lacking), 80)
        raise SaveFailed(0, f"another rank has {name}, which rank 0 does not")
    for part, state in states.items():
        writer = _IndexWriter()
        for name, tensor in state.tensors.items():
            path = f"{part}/{name}"
            writer.add(name, names.get(path, name), tensor, assigned.get(path))
        wrong = what_is_wrong(writer.index)
        if wrong:
            raise SaveFailed(0, wrong)
        data = msgspec.json.encode(writer.index)
        if len(data) > MAX_INDEX_BYTES:
            raise SaveFailed(
                0, f"the index of {part} has {len(data)} bytes; the maximum is {MAX_INDEX_BYTES}"
            )
        indexes[f"{part}/{INDEX_NAME}"] = data
    return indexes


class _IndexWriter:
    """Collects the entries of one part's index."""

    def __init__(self) -> None:
        self.index = ShardIndex({}, [], [])
        self._cuts: dict[int, int] = {}
        self._ranks: dict[bytes, int] = {}

    def add(self, name: str, inside: str, tensor: torch.Tensor, assigned: Assigned | None) -> None:
        """Add a tensor, whose shards are called after ``inside``; without bytes it has none."""
        dtype, shape = DTYPES[tensor.dtype], list(tensor.shape)
        boxes = assigned.division.boxes if assigned is not None else []
        if assigned is None or len(boxes) <= FEW_SHARDS or inside != name:
            writers = assigned.writers.tolist() if assigned is not None else []
            shards = [
                _shard(inside, rank, box, shape) for rank, box in zip(writers, boxes, strict=True)
            ]
            self.index.tensors[name] = IndexedTensor(dtype, shape, shards)
            return
        cut, ranks = self._cut(assigned.division), self._ranks_of(assigned.writers)
        self.index.tensors[name] = IndexedTensor(dtype, shape, cut=cut, ranks=ranks)

    def _cut(self, division: Division) -> int:
        number = self._cuts.setdefault(id(division), len(self._cuts))
        if number == len(self.index.cuts):
            offsets = [list(box.offsets) for box in division.boxes]
            self.index.cuts.append(Cut(offsets, [list(box.sizes) for box in division.boxes]))
        return number

    def _ranks_of(self, writers: Any) -> int:
        number = self._ranks.setdefault(writers.tobytes(), len(self._ranks))
        if number == len(self.index.ranks):
            self.index.ranks.append(writers.tolist())
        return number


def _shard(inside: str, rank: int, box: TensorBox, shape: list[int]) -> Shard:
    offsets, sizes = list(box.offsets), list(box.sizes)
    name = shard_name(inside, offsets, is_whole=sizes == shape)
    return Shard(shard_file(rank), name, offsets, sizes)
