"""Which rank writes which tensor: agreed once, and kept while no rank's state changes its form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

import msgspec
import torch
from torch import distributed
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from elastic_ckpt.errors import SaveFailed
from elastic_ckpt.training.engines.torch.state import PartState
from elastic_ckpt.training.tensors.safetensors_file import DTYPES, METADATA_KEY, Header, make_header
from elastic_ckpt.training.tensors.shard_index import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    IndexedTensor,
    Shard,
    ShardIndex,
    shard_file,
    what_is_wrong,
)
from elastic_ckpt.util.text import printable

dist: Any = distributed

_SAME: Final = 0
_CHANGED: Final = 1
_FAILED: Final = 2


@dataclass(frozen=True)
class PlannedFile:
    """A file of this rank; ``names`` maps a tensor's name in the file to its own name."""

    part: str
    path: str
    header: Header
    names: Mapping[str, str]


@dataclass(frozen=True)
class RankPlan:
    """What this rank writes: the files of its tensors, and on rank 0 the indexes by path."""

    files: list[PlannedFile]
    indexes: dict[str, bytes]


Form = list[tuple[Any, ...]]


class PlanCache:
    """Keeps the plan of the last save."""

    def __init__(self) -> None:
        self._form: Form | None = None
        self._plan: RankPlan | None = None

    def plan_for(self, states: Mapping[str, PartState] | Exception) -> RankPlan:
        """Return the plan for the states by part; this rank may have an error instead. Collective:
        one number per rank, more after a change. SaveFailed, on every rank, if a rank has no states
        or they do not fit together."""
        form = None if isinstance(states, Exception) else _form(states)
        mine = _FAILED if form is None else _SAME if form == self._form else _CHANGED
        worst = _largest(mine)
        if isinstance(states, Exception):
            if worst == _FAILED:
                _gather(str(states))
            raise states
        if worst == _FAILED:
            reasons = _gather("")
            rank = next(rank for rank, reason in enumerate(reasons) if reason)
            raise SaveFailed(rank, printable(reasons[rank]))
        if worst == _CHANGED or self._plan is None:
            self._form = self._plan = None
            self._plan = _make_plan(states)
            self._form = form
        return self._plan


def _form(states: Mapping[str, PartState]) -> Form:
    """Return everything that a plan depends on."""
    return [
        (part, name, tensor.dtype, tensor.shape, name in state.alike)
        + ((tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ())
        for part, state in states.items()
        for name, tensor in state.tensors.items()
    ]


def _make_plan(states: Mapping[str, PartState]) -> RankPlan:
    rank = dist.get_rank() if _is_distributed() else 0
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(_candidates(states, rank), is_coordinator=rank == 0)
    local = planner.create_local_plan()
    plans = _gather(replace(local, items=[item for item in local.items if _has_bytes(item)]))
    _check_alike(plans)
    try:
        plans, _ = planner.create_global_plan(plans)
    except (ValueError, AssertionError) as error:
        raise SaveFailed(0, f"the ranks' states do not fit together: {error}") from error
    pieces = [_pieces(plan, shard_file(writer)) for writer, plan in enumerate(plans)]
    return RankPlan(
        files=_files(pieces[rank], shard_file(rank)),
        indexes=_indexes(pieces, states) if rank == 0 else {},
    )


def _candidates(states: Mapping[str, PartState], rank: int) -> dict[str, torch.Tensor]:
    """Return what this rank may write, largest first, as the planner balances in this order."""
    found = {
        f"{part}/{name}": tensor
        for part, state in states.items()
        for name, tensor in state.tensors.items()
        if rank == 0 or name in state.alike or isinstance(tensor, DTensor)
    }
    return dict(sorted(found.items(), key=lambda item: (-item[1].nbytes, item[0])))


def _has_bytes(item: WriteItem) -> bool:
    return item.tensor_data is not None and item.tensor_data.chunk.sizes.numel() > 0


def _check_alike(plans: list[SavePlan]) -> None:
    """Check that all ranks describe a tensor as rank 0's tree does."""
    seen: dict[str, Any] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            data: Any = item.tensor_data
            described = (tuple(data.size), data.properties.dtype)
            if seen.setdefault(item.index.fqn, described) != described:
                name = printable(item.index.fqn, 80)
                raise SaveFailed(rank, f"its {name} has another shape or dtype than other ranks'")


@dataclass(frozen=True)
class _Piece:
    """One tensor's shard in one rank's file."""

    part: str
    tensor: str
    dtype: torch.dtype
    shard: Shard


def _pieces(plan: SavePlan, file: str) -> list[_Piece]:
    """Return what a rank writes; shards of one tensor have different names in its file."""
    pieces: list[_Piece] = []
    used: set[tuple[str, str]] = set()
    for item in plan.items:
        data: Any = item.tensor_data
        part, tensor = item.index.fqn.split("/", 1)
        offsets, sizes = list(data.chunk.offsets), list(data.chunk.sizes)
        name = tensor
        if data.chunk.sizes != data.size:
            name += "@" + ",".join(map(str, offsets))
        while (part, name) in used or name == METADATA_KEY:
            name += "_"
        used.add((part, name))
        shard = Shard(file, name, offsets, sizes)
        pieces.append(_Piece(part, tensor, data.properties.dtype, shard))
    return pieces


def _files(pieces: list[_Piece], file: str) -> list[PlannedFile]:
    planned = []
    for part in sorted({piece.part for piece in pieces}):
        mine = [piece for piece in pieces if piece.part == part]
        layout = {piece.shard.name: (piece.dtype, piece.shard.sizes) for piece in mine}
        names = {piece.shard.name: piece.tensor for piece in mine}
        planned.append(PlannedFile(part, f"{part}/{file}", make_header(layout), names))
    return planned


def _indexes(pieces: list[list[_Piece]], states: Mapping[str, PartState]) -> dict[str, bytes]:
    """Return the index of each part, by path; an incomplete one fails the save."""
    shards: defaultdict[tuple[str, str], list[Shard]] = defaultdict(list)
    for piece in chain.from_iterable(pieces):
        shards[piece.part, piece.tensor].append(piece.shard)
    indexes = {}
    for part, state in states.items():
        tensors = {}
        for name, tensor in state.tensors.items():
            found = shards.pop((part, name), [])
            tensors[name] = IndexedTensor(DTYPES[tensor.dtype], list(tensor.shape), found)
            wrong = what_is_wrong(tensors[name])
            if wrong:
                raise SaveFailed(0, f"{printable(name, 80)}: {wrong}")
        data = msgspec.json.encode(ShardIndex(tensors))
        if len(data) > MAX_INDEX_BYTES:
            raise SaveFailed(
                0, f"the index of {part} has {len(data)} bytes; the maximum is {MAX_INDEX_BYTES}"
            )
        indexes[f"{part}/{INDEX_NAME}"] = data
    if shards:
        name = printable("/".join(next(iter(shards))), 80)
        raise SaveFailed(0, f"another rank has {name}, which rank 0 does not")
    return indexes


def _is_distributed() -> bool:
    return bool(dist.is_initialized() and dist.get_world_size() > 1)


def _largest(number: int) -> int:
    if not _is_distributed():
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    worst = torch.tensor(number, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return int(worst)


def _gather(value: Any) -> list[Any]:
    if not _is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
