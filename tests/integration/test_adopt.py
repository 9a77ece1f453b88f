"""``elastic-ckpt adopt``: a job resumes from a checkpoint of plain ColossalAI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

from tests.integration.ranks import run_ranks
from tests.integration.test_colossalai import boosted, same, state_of, train
from tests.job import environment

pytestmark = pytest.mark.one_torch


def save_plainly(rank: int, directory: str) -> None:
    """As the scripts of ColossalAI do, which know nothing of us."""
    import torch

    objects = boosted()
    booster, model, optimizer, scheduler = objects
    train(*objects, 3)
    place = os.path.join(directory, "epoch-0_step-3")
    os.makedirs(os.path.join(place, "modeling"), exist_ok=True)
    booster.save_model(model, os.path.join(place, "modeling"), shard=True)
    booster.save_optimizer(optimizer, os.path.join(place, "optimizer"), shard=True)
    booster.save_lr_scheduler(scheduler, os.path.join(place, "lr_scheduler"))
    if rank == 0:
        states = {"epoch": 0, "step": 3, "sample_start_index": 6}
        Path(place, "running_states.json").write_text(json.dumps(states))
        torch.save(state_of(model, optimizer, scheduler), os.path.join(directory, "expected"))


def resume(rank: int, directory: str) -> tuple[bool, int, list[int]]:
    """Whether the state is the saved one, the step, and the samples that follow."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from elastic_ckpt import ElasticSampler, Session

    booster, model, optimizer, scheduler = boosted(5.0)
    data = TensorDataset(torch.arange(20))
    loader = DataLoader(data, batch_size=2, sampler=ElasticSampler(data, shuffle=False))
    expected = torch.load(os.path.join(directory, "expected"), weights_only=True)
    used: list[int] = []
    with Session(
        directory, booster=booster, model=model, optimizer=optimizer, lr_scheduler=scheduler
    ) as session:
        found = same(state_of(model, optimizer, scheduler), expected)
        began = session.step
        for _ in session.epochs(1):
            for (numbers,) in session.batches(loader):
                used += numbers.tolist()
    return found, began, used


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", *arguments],
        capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip


def test_job_resumes_from_a_plain_colossalai_checkpoint(tmp_path: Path) -> None:
    run_ranks(save_plainly, 2, str(tmp_path))
    place = str(tmp_path / "epoch-0_step-3")
    refused = command("adopt", place)
    assert refused.returncode == 64 and "--data-parallel-size" in refused.stderr
    done = command("adopt", place, "--data-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    assert "12 samples of epoch 0 used" in done.stdout
    assert command("verify", str(tmp_path), "--full").returncode == 0
    assert "sealed already" in command("adopt", place).stdout
    found = run_ranks(resume, 2, str(tmp_path))
    assert found == [(True, 3, [12, 14, 16, 18]), (True, 3, [13, 15, 17, 19])]


@pytest.mark.parametrize("what", ["missing", "file", "name"])
def test_other_paths_are_a_usage_error(tmp_path: Path, what: str) -> None:
    place = tmp_path / ("epoch-0_step-3" if what != "name" else "elsewhere")
    if what == "file":
        place.touch()
    if what == "name":
        place.mkdir()
    done = command("adopt", str(place))
    assert done.returncode == 64 and "epoch-N_step-M" in done.stderr
