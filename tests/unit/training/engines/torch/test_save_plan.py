"""A plan is kept while it fits the state, and replaced when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from elastic_ckpt.errors import SaveFailed, UsageError
from elastic_ckpt.training.engines.torch import planned_files
from elastic_ckpt.training.engines.torch.save_plan import PlanCache, RankPlan
from elastic_ckpt.training.engines.torch.state import PartState, module_state, optimizer_state
from elastic_ckpt.training.tensors.shard_index import ShardIndex


class Trainer:
    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self) -> None:
        self.model(torch.rand(4, 3)).sum().backward()
        self.optimizer.step()

    def states(self) -> dict[str, PartState]:
        states = {"modeling": module_state(self.model)}
        found = optimizer_state(self.model, self.optimizer)
        if found is not None:
            states["optimizer"] = found
        return states


def names(plan: RankPlan) -> dict[str, set[str]]:
    return {file.path: set(file.names.values()) for file in plan.files}


def replace_weight(trainer: Trainer) -> None:
    trainer.model[0].weight = nn.Parameter(torch.rand(3, 3))


CHANGES: dict[str, Callable[[Trainer], Any]] = {
    "the optimizer's first step": lambda trainer: trainer.step(),
    "a parameter more": lambda trainer: trainer.model.append(nn.Linear(2, 2)),
    "a parameter less": lambda trainer: trainer.model.pop(1),
    "another dtype": lambda trainer: trainer.model.to(torch.bfloat16),
    "another shape": replace_weight,
    "another name": lambda trainer: trainer.model.insert(0, nn.Identity()),
    "a buffer more": lambda trainer: trainer.model.register_buffer("b", torch.ones(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_state_needs_a_new_plan(change: str) -> None:
    trainer, cache = Trainer(), PlanCache()
    first = cache.plan_for(trainer.states())
    CHANGES[change](trainer)
    second = cache.plan_for(trainer.states())
    assert second is not first
    held = {
        f"{part}/00000.safetensors": set(state.tensors)
        for part, state in trainer.states().items()
        if state.tensors
    }
    assert names(second) == held
    for path, data in second.indexes.items():
        index = msgspec.json.decode(data, type=ShardIndex)
        assert set(index.tensors) == set(trainer.states()[path.split("/")[0]].tensors)


def test_a_plan_is_kept_while_only_values_change() -> None:
    trainer, cache = Trainer(), PlanCache()
    trainer.step()
    first = cache.plan_for(trainer.states())
    trainer.step()
    trainer.optimizer.param_groups[0]["lr"] = 0.5
    assert cache.plan_for(trainer.states()) is first


def test_a_plan_is_kept_if_only_the_tensor_objects_change() -> None:
    """An optimizer whose state was loaded has new ones of the same form."""
    trainer, cache = Trainer(), PlanCache()
    trainer.step()
    first = cache.plan_for(trainer.states())
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())
    assert cache.plan_for(trainer.states()) is first


def test_a_failed_state_raises_its_own_error_and_keeps_the_plan() -> None:
    trainer, cache = Trainer(), PlanCache()
    first = cache.plan_for(trainer.states())
    with pytest.raises(UsageError, match="odd"):
        cache.plan_for(UsageError("odd"))
    assert cache.plan_for(trainer.states()) is first


def test_an_index_that_is_too_large_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, cache = Trainer(), PlanCache()
    monkeypatch.setattr(planned_files, "MAX_INDEX_BYTES", 100)
    with pytest.raises(SaveFailed, match="the index of modeling has"):
        cache.plan_for(trainer.states())
    monkeypatch.undo()
    assert cache.plan_for(trainer.states()).indexes  # and the failure is not kept


def test_a_reserved_name_is_replaced() -> None:
    model = nn.Module()
    model.register_parameter("__metadata__", nn.Parameter(torch.ones(2)))
    model.register_parameter("__metadata___", nn.Parameter(torch.ones(3)))
    (file,) = PlanCache().plan_for({"modeling": module_state(model)}).files
    assert set(file.names.values()) == set(module_state(model).tensors)
    assert "__metadata__" not in file.names and len(file.names) == 2
