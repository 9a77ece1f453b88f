"""What a script gives its optimizer and schedule counts once; later the checkpoint's values do."""

import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session
from elastic_ckpt.errors import CheckpointError
from tests.integration.test_session import run

pytestmark = pytest.mark.one_torch


def train(
    directory: str, epochs: int, optimizer_class: Any = torch.optim.Adam, **given: Any
) -> Any:
    """Return the lines about replaced values, and the rate with which the training began."""
    model = nn.Linear(2, 1)
    optimizer = optimizer_class(model.parameters(), **{"lr": 0.01, **given})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 4)
    data = TensorDataset(torch.ones(16, 2))
    loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data, seed=0))
    session = Session(directory, model=model, optimizer=optimizer, lr_scheduler=schedule)
    try:
        with session:
            began = optimizer.param_groups[0]["lr"]
            for _ in session.epochs(epochs):
                for (batch,) in session.batches(loader):
                    model(batch).mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
    except CheckpointError as error:
        return str(error)
    return session._rank_state.replaced, began


def test_values_that_the_checkpoint_replaces_are_named_at_each_start(tmp_path: Path) -> None:
    directory, changed = str(tmp_path), partial(train, lr=0.5, weight_decay=0.1)
    assert run(train, directory, 1) == ([], 0.01)
    assert run(train, directory, 1) == ([], pytest.approx(0.0))
    (optimizer, schedule), _ = run(changed, directory, 2)
    assert "lr=0.5 instead of 0.01, weight_decay=0.1 instead of 0" in optimizer
    assert "optimizer.param_groups[...] after the Session is entered" in optimizer
    assert "T_max=8 instead of 4" in schedule and "epoch-1_step-4" in schedule
    assert len(run(changed, directory, 2)[0]) == 2  # what it gives still does not count
    again = run(train, directory, 3)[0]
    assert len(again) == 1 and "T_max=12 instead of 4" in again[0]
    assert run(train, directory, 1)[0] == []


def set_inside(directory: str, epochs: int, given: float, rate: float) -> list[str]:
    """Return the lines, where the script sets the rate inside the Session."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=given)
    data = TensorDataset(torch.ones(8, 2))
    loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data, seed=0))
    session = Session(directory, model=model, optimizer=optimizer)
    with session:
        optimizer.param_groups[0]["lr"] = rate
        for _ in session.epochs(epochs):
            for (batch,) in session.batches(loader):
                model(batch).mean().backward()
                optimizer.step()
    return session._rank_state.replaced


def test_a_value_that_the_checkpoint_has_by_now_is_not_named(tmp_path: Path) -> None:
    directory = str(tmp_path)
    assert run(partial(set_inside, given=0.1, rate=0.1), directory, 1) == []
    [said] = run(partial(set_inside, given=0.2, rate=0.2), directory, 2)
    assert "lr=0.2 instead of 0.1" in said
    assert run(partial(set_inside, given=0.2, rate=0.2), directory, 3) == []


def test_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    run(train, str(tmp_path), 1)
    assert "it is SGD instead of Adam" in run(train, str(tmp_path), 2, torch.optim.SGD)


def two_optimizers(directory: str, **extra: Any) -> str:
    model = nn.Linear(2, 1)
    first, second = (torch.optim.Adam(model.parameters()) for _ in range(2))
    data = TensorDataset(torch.ones(8, 2))
    loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data, seed=0))
    given = {"second": second} if extra else None
    session = Session(directory, model=model, optimizer=first, extra=given)
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        with session:
            for _ in session.epochs(2):
                for (batch,) in session.batches(loader):
                    model(batch).mean().backward()
                    first.step()
                    second.step()
        second.step()
    return printed.getvalue()


def test_optimizer_that_the_session_lacks_is_named_in_one_line(tmp_path: Path) -> None:
    assert run(two_optimizers, str(tmp_path / "a")).count("the Session was not given it") == 1
    assert run(partial(two_optimizers, known=True), str(tmp_path / "b")).count("warning") == 0
