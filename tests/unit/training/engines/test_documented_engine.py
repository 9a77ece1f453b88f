"""The engine that CONTRIBUTING.md shows how to add, as a script selects it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.engines import EngineInputs, make_engine
from tests.contributing import ROOT, install_example

SCRIPT = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from elastic_ckpt import ElasticSampler, Session

model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.arange(8.0).reshape(8, 1))
loader = DataLoader(data, sampler=ElasticSampler(data))
with Session(sys.argv[1], model=model, optimizer=optimizer, engine="weights") as session:
    print(session.step, model.weight.item())
    for epoch in session.epochs(1):
        for batch in session.batches(loader):
            optimizer.zero_grad()
            model(batch[0]).sum().backward()
            optimizer.step()
    print(session.step, model.weight.item())
"""


def run(packages: Path, job: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", SCRIPT, str(job)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_session_saves_through_it_and_resumes(tmp_path: Path) -> None:
    install_example("Adding an engine", tmp_path)
    first = run(tmp_path, tmp_path / "job")
    manifest = read_manifest(tmp_path / "job" / "epoch-1_step-8")
    assert manifest.engine.name == "weights"
    assert "weights.safetensors" in [entry.path for entry in manifest.files]
    assert run(tmp_path, tmp_path / "job") == [first[1], first[1]]


def test_an_unknown_name_is_a_usage_error_that_lists_the_available_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_example("Adding an engine", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="'weight'; available: torch, colossalai, weights"):
        make_engine(EngineInputs(None, None, None, None), "weight")
