"""An optimizer that a Session lacks is named if it steps parameters of its model."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from elastic_ckpt.training.script import other_optimizers
from elastic_ckpt.training.script.other_optimizers import OtherOptimizers


class Sam(Optimizer):
    """Its own state has not that of the one that steps."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base

    def step(self, closure: Any = None) -> None:
        self.base.step()


def stepping(model: nn.Module, given: Any, *optimizers: Optimizer) -> list[str]:
    """Step each optimizer three times; return what was said."""
    said: list[str] = []
    others = OtherOptimizers(model, given, said.append)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers * 3:
        optimizer.step()
    others.close()
    for optimizer in optimizers:
        optimizer.step()
    return said


@pytest.mark.parametrize(
    "given",
    [
        lambda one: one,
        lambda one: SimpleNamespace(optim=one),
        lambda one: SimpleNamespace(optimizers=[{"net": one}]),
    ],
)
def test_optimizer_that_was_given_or_is_wrapped_is_fine(given: Callable[[Any], Any]) -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters())
    assert stepping(model, [given(optimizer)], optimizer) == []


def test_optimizer_that_replaces_the_first_is_named_once() -> None:
    model = nn.Linear(2, 1)
    first, *others = (AdamW(model.parameters()) for _ in range(3))
    [line] = stepping(model, [first, StepLR(others[0], 1)], first, *others)
    assert "AdamW steps 2 of the model's parameters (first weight)" in line
    assert "extra={" in line and "\n" not in line


def test_inner_optimizer_that_its_wrapper_does_not_save_is_named() -> None:
    model = nn.Linear(2, 1)
    base = SGD(model.parameters(), momentum=0.9)
    sam = Sam(base)
    assert "SGD" in stepping(model, [sam], sam)[0]
    sam.state = base.state
    assert stepping(model, [sam], sam) == []


def test_optimizer_of_another_model_is_fine() -> None:
    assert stepping(nn.Linear(2, 1), [], SGD(nn.Linear(2, 1).parameters())) == []


def test_step_costs_a_tenth_of_a_microsecond(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[Any] = []
    monkeypatch.setattr(other_optimizers, "register_optimizer_step_post_hook", hooks.append)
    optimizer = SGD(nn.Linear(2, 1).parameters())
    OtherOptimizers(nn.Linear(2, 1), [optimizer], print)
    times = timeit.repeat(lambda: hooks[0](optimizer, (), {}), number=10_000, repeat=9)
    assert min(times) / 10_000 < 1e-6  # 0.1 us on an idle machine
