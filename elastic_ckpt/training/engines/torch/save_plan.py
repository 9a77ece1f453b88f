"""Which rank writes which tensor: agreed once, and kept while no rank's state changes its form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from elastic_ckpt.errors import SaveFailed
from elastic_ckpt.training.engines.torch.division import HeldTensors, assign, needed_tables
from elastic_ckpt.training.engines.torch.planned_files import (
    PlannedFile,
    files_of,
    indexes_of,
    names_in_files,
)
from elastic_ckpt.training.engines.torch.state import PartState
from elastic_ckpt.util.text import printable

dist: Any = distributed

_SAME: Final = 0
_CHANGED: Final = 1
_FAILED: Final = 2


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
        or the ranks describe a tensor differently."""
        form = None if isinstance(states, Exception) else _form(states)
        mine = _FAILED if form is None else _SAME if form == self._form else _CHANGED
        worst = _largest(mine)
        if isinstance(states, Exception):
            if worst == _FAILED:
                gather(str(states))
            raise states
        if worst == _FAILED:
            reasons = gather("")
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
    mine = HeldTensors.of(candidates(states, rank))
    offers = gather(mine.offer())
    needed = needed_tables(offers)
    table = mine.encoded_table()
    tables = {one: told(one, table) for one in needed} if len(needed) > 1 else {0: table}
    assigned = assign(offers, tables)
    names = names_in_files(assigned)
    return RankPlan(
        files=files_of(assigned, names, rank),
        indexes=indexes_of(assigned, names, states) if rank == 0 else {},
    )


def candidates(states: Mapping[str, PartState], rank: int) -> dict[str, torch.Tensor]:
    """Return what this rank may write."""
    return {
        f"{part}/{name}": tensor
        for part, state in states.items()
        for name, tensor in state.tensors.items()
        if rank == 0 or name in state.alike or isinstance(tensor, DTensor)
    }


def _is_distributed() -> bool:
    return bool(dist.is_initialized() and dist.get_world_size() > 1)


def _largest(number: int) -> int:
    if not _is_distributed():
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    worst = torch.tensor(number, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return int(worst)


def told(rank: int, value: bytes) -> bytes:
    """Return a rank's value on every rank."""
    told: list[Any] = [value]
    dist.broadcast_object_list(told, src=rank)
    return bytes(told[0])


def gather(value: Any) -> list[Any]:
    """Return every rank's value on every rank."""
    if not _is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
