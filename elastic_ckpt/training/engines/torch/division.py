"""Which rank writes which part of each tensor: every rank computes it from all ranks' offers.

Tensors that are sharded alike form a group. A rank's offer contains its own box of each group, and
a digest of the table of tensors and their groups. Nearly all ranks have the same table, so that
they need not exchange thousands of names. Of the ranks that hold the same box, the one with the
fewest bytes so far writes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import msgspec
import numpy as np
import torch
import xxhash
from torch.distributed.tensor import DTensor

from elastic_ckpt.errors import SaveFailed
from elastic_ckpt.training.tensors.local_box import TensorBox, local_boxes
from elastic_ckpt.training.tensors.safetensors_file import DTYPES, NAMED_DTYPES
from elastic_ckpt.util.text import printable

_NO_RANK: Final = -1
_NEVER: Final = 2**62
"""More bytes than a rank can have to write."""

Table = dict[str, tuple[str, tuple[int, ...], int]]
"""By a tensor's name: its dtype, its shape, and the number of its group."""

_Offer = tuple[str, list[TensorBox]]
_offers: Final = msgspec.json.Decoder(_Offer)
_tables: Final = msgspec.json.Decoder(Table)


@dataclass(frozen=True)
class HeldTensors:
    """What one rank can write: the table of its tensors, and its box of each group."""

    table: Table
    boxes: list[TensorBox]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> HeldTensors:
        """Return what this rank holds of these tensors."""
        table: Table = {}
        groups: dict[Any, int] = {}
        boxes: list[TensorBox] = []
        found = local_boxes(tensors)
        for name in sorted(found):
            tensor, box = tensors[name], found[name]
            sharded = (
                (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
            )
            shape = tuple(tensor.shape)
            group = groups.setdefault((sharded, shape, box), len(groups))
            if group == len(boxes):
                boxes.append(box)
            table[name] = DTYPES[tensor.dtype], shape, group
        return cls(table, boxes)

    def offer(self) -> bytes:
        """Return the table's digest and the boxes, encoded: enough for ranks with this table."""
        return msgspec.json.encode((self._digest(), self.boxes))

    def encoded_table(self) -> bytes:
        """Return the table, encoded, for ranks with another one."""
        return msgspec.json.encode(self.table)

    def _digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.encoded_table())


def needed_tables(offers: Sequence[bytes]) -> list[int]:
    """Return the first rank with each table: rank 0 alone if all tables are equal."""
    digests = [_offers.decode(offer)[0] for offer in offers]
    return sorted(digests.index(digest) for digest in set(digests))


@dataclass(frozen=True)
class Division:
    """How a shape is cut, and which ranks hold each box.

    Attributes:
        boxes: those that are not empty, each once.
        holders: a row of ranks for each box, padded with ``_NO_RANK``.
        elements: the number of elements of each box.
    """

    boxes: list[TensorBox]
    holders: Any
    elements: Any

    @classmethod
    def of(cls, held: Sequence[tuple[int, TensorBox]]) -> Division:
        """Return the division of what ranks hold."""
        ranks: defaultdict[TensorBox, list[int]] = defaultdict(list)
        for rank, box in held:
            if prod(box.sizes):
                ranks[box].append(rank)
        boxes = sorted(ranks)
        most = max(map(len, ranks.values()), default=1)
        holders = np.full((len(boxes), most), _NO_RANK, dtype=np.int64)
        for number, box in enumerate(boxes):
            holders[number, : len(ranks[box])] = ranks[box]
        elements = np.array([prod(box.sizes) for box in boxes], dtype=np.int64)
        return cls(boxes, holders, elements)

    def choose(self, load: Any, width: int) -> Any:
        """Return the rank that writes each box of a tensor, and add its bytes to that rank's load.

        Args:
            load: bytes by rank, with one more entry for ``_NO_RANK``.
            width: bytes of an element.
        """
        writers = self.holders[:, 0]
        if self.holders.shape[1] > 1:
            least = load[self.holders].argmin(axis=1)
            writers = np.take_along_axis(self.holders, least[:, None], axis=1)[:, 0]
        load[writers] += self.elements * width  # a rank holds one box of a tensor
        return writers


@dataclass(frozen=True)
class Assigned:
    """A tensor, how it is cut, and the rank that writes each box."""

    dtype: str
    shape: tuple[int, ...]
    division: Division
    writers: Any


def assign(offers: Sequence[bytes], tables: Mapping[int, bytes]) -> dict[str, Assigned]:
    """Return the writers of each tensor by name; the result is the same on every rank.

    Args:
        offers: of all ranks.
        tables: encoded, by rank, of the ranks that :func:`needed_tables` returned.

    Raises:
        SaveFailed: ranks describe a tensor differently.
    """
    said = [_offers.decode(offer) for offer in offers]
    kinds = {said[rank][0]: kind for kind, rank in enumerate(sorted(tables))}
    ranks: list[list[int]] = [[] for _ in kinds]
    for rank, (digest, _) in enumerate(said):
        ranks[kinds[digest]].append(rank)
    described, groups = _described({rank: _tables.decode(tables[rank]) for rank in sorted(tables)})
    divisions: dict[tuple[tuple[int, int], ...], Division] = {}
    load = np.zeros(len(said) + 1, dtype=np.int64)
    load[_NO_RANK] = _NEVER
    assigned = {}
    for name in sorted(described, key=lambda name: (-_bytes(*described[name]), name)):
        key = tuple(groups[name])
        if key not in divisions:
            held = [(rank, said[rank][1][group]) for kind, group in key for rank in ranks[kind]]
            divisions[key] = Division.of(held)
        dtype, shape = described[name]
        writers = divisions[key].choose(load, NAMED_DTYPES[dtype].itemsize)
        assigned[name] = Assigned(dtype, shape, divisions[key], writers)
    return assigned


def _described(
    tables: Mapping[int, Table],
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, list[tuple[int, int]]]]:
    """Return each tensor's dtype and shape, and in which group of which kind of table it is."""
    described: dict[str, tuple[str, tuple[int, ...]]] = {}
    groups: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for kind, (rank, table) in enumerate(tables.items()):
        for name, (dtype, shape, group) in table.items():
            if described.setdefault(name, (dtype, shape)) != (dtype, shape):
                shown = printable(name, 80)
                raise SaveFailed(rank, f"its {shown} has another shape or dtype than other ranks'")
            groups[name].append((kind, group))
    return described, groups


def _bytes(dtype: str, shape: Sequence[int]) -> int:
    return prod(shape) * NAMED_DTYPES[dtype].itemsize
