"""Which parameters are frozen is in no state: a resume that trains others says so."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session
from tests.integration.test_session import run

pytestmark = pytest.mark.one_torch


def train(directory: str, epochs: int, stop_in: int, freezes: str, steps: int = 2) -> str:
    """Train until step ``steps`` of epoch ``stop_in``; ``freezes`` is a condition. Return what was
    printed."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.ones(16, 2))
    loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data, seed=0))
    session = Session(directory, model=model, optimizer=optimizer, save_interval=1)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.suppress(ValueError), session:
        for epoch in session.epochs(epochs):
            if eval(freezes, {"epoch": epoch}):
                model[0].requires_grad_(not model[0].weight.requires_grad)
            for number, (batch,) in enumerate(session.batches(loader)):
                if (epoch, number) == (stop_in, steps):
                    raise ValueError
                model(batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    return printed.getvalue()


def test_layers_that_a_resume_trains_again_are_named(tmp_path: Path) -> None:
    directory = str(tmp_path)
    assert "warning" not in run(train, directory, 3, 2, "epoch == 1")
    said = run(train, directory, 3, -1, "epoch == 1")
    assert said.count("warning") == 1
    assert "2 parameters were frozen when epoch-2_step-10 was saved and trained now" in said
    assert "first 0.bias" in said and "`if epoch >= 2:`" in said


def test_layers_that_a_resume_trains_no_more_are_named(tmp_path: Path) -> None:
    directory = str(tmp_path)
    run(train, directory, 3, 2, "epoch in (0, 1)")  # frozen first, and thawed in epoch 1
    said = run(train, directory, 3, -1, "epoch == 0 or epoch == 2")
    assert "2 parameters were trained when epoch-2_step-10 was saved and frozen now" in said


@pytest.mark.parametrize("steps", [0, 1])
def test_script_that_freezes_by_epoch_gets_no_warning(tmp_path: Path, steps: int) -> None:
    """Also where the checkpoint is the last one before the epoch that freezes."""
    directory, freezes = str(tmp_path), "epoch == 1"
    run(train, directory, 3, 1, freezes, steps)
    assert "warning" not in run(train, directory, 3, -1, freezes)
