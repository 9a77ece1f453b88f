"""What a Session is given is checked in its constructor: one line that says what to write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from elastic_ckpt import Session
from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.data.loaders import inspect
from elastic_ckpt.training.state.session_state import SessionState

MODEL = nn.Linear(2, 1)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: an Optimizer whose constructor never ran."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"extra": {"best": 0.0}}, "session.state['best'] = ..."),
        ({"extra": {"model": MODEL, "seen": [1]}}, "extra['seen'] is a list"),
        ({"extra": [MODEL]}, "a dict of objects by name"),
        ({"model": [MODEL, MODEL]}, "nn.ModuleList"),
        ({"model": None}, "model is a NoneType"),
        ({"model": nn.Sequential(nn.LazyLinear(1))}, "the model's 0.weight has no shape yet"),
        ({"lr_scheduler": 0.1}, "lr_scheduler is a float"),
        ({"optimizer": Wrapper(torch.optim.SGD(MODEL.parameters(), lr=1.0))},
         "optimizer=optimizer.optimizer"),
        ({"name": "../x"}, 'name="fold0"'),
        ({"name": ".x"}, 'name="fold0"'),
        ({"name": 3}, 'name="fold0"'),
    ],
)  # fmt: skip
def test_constructor_refuses_what_cannot_be_saved(inputs: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        Session("unused", **{"model": MODEL, **inputs})
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("loader", [(x for x in "ab"), [1, 2], DataLoader(Stream())])
def test_batches_need_positions(loader: Any) -> None:
    with pytest.raises(UsageError, match=r"no position to resume at"):
        inspect(loader, None, 1)


def test_session_state_keeps_plain_values() -> None:
    state = SessionState()
    state["best"] = float("inf")
    state["log"] = {"run": "a1", "steps": [1, 2.5, None, True]}
    assert json.loads(state.encode_if_any()) == state
    assert SessionState().encode_if_any() == b""


@pytest.mark.parametrize("value", [torch.tensor(1.0), (1, 2), {1: 2}, {1}, object(), [[b"x"]]])
def test_session_state_refuses_other_values_where_they_are_set(value: Any) -> None:
    state = SessionState()
    with pytest.raises(UsageError, match=r"session\.state\['x'\]"):
        state["x"] = value
    state["x"] = []
    state["x"].append(value)
    with pytest.raises(UsageError, match=r"session\.state\['x'\]"):
        state.encode_if_any()


def test_session_state_is_small() -> None:
    state = SessionState(x="y" * 2_000_000)
    with pytest.raises(UsageError, match="extra="):
        state.encode_if_any()
