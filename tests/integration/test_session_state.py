"""What a script keeps besides its model, and what it may ask before it builds it."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session, resume_place
from elastic_ckpt.checkpoint.catalog import list_checkpoints, newest_intact
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.interval import OptimalInterval
from elastic_ckpt.training import auto_interval, runtime
from tests.integration.ranks import run_ranks
from tests.integration.test_session import run


def train(directory: str, epochs: int, leave_at: int = 0) -> list[Any]:
    """A second parameter group joins in epoch 1, as for a backbone that is unfrozen then."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    rank = dist.get_rank() if dist.is_initialized() else 0
    head, backbone = nn.Linear(4, 1), nn.Linear(4, 4)
    model: nn.Module = nn.Sequential(backbone, head)
    place = resume_place(directory)
    assert resume_place(directory) == place
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    grouped = place.state.get("grouped", False)
    if grouped:
        optimizer.add_param_group({"params": list(backbone.parameters()), "lr": 0.001})
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    inputs = torch.randn(32, 4)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data, seed=0))
    with Session(directory, model=model, optimizer=optimizer, save_interval=2) as session:
        best = session.state.setdefault("best", float("inf"))
        assert session.step == place.step and place.state.get("best", best) == best
        session.state.setdefault("run", f"from rank {rank}")
        for epoch in session.epochs(epochs):
            if epoch == 1 and not grouped:
                session.state["grouped"] = True
                optimizer.add_param_group({"params": list(backbone.parameters()), "lr": 0.001})
            for x, y in session.batches(loader):
                loss = (model(x) - y).pow(2).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                session.state["best"] = min(session.state["best"], loss.item())
                if session.step + 1 == leave_at:
                    raise SystemExit(9)
    flat = torch.cat([one.detach().flatten() for one in model.parameters()])
    return [place.step, session.state["best"], session.state["run"], flat.tolist()]


def test_state_and_place_survive_a_restart_to_the_same_bits(tmp_path: Path) -> None:
    """The script knows its place before it builds the optimizer, so its groups fit."""
    whole = run(train, str(tmp_path / "a"), 2)
    assert run(train, str(tmp_path / "b"), 2, 15) == 9
    resumed = run(train, str(tmp_path / "b"), 2)
    assert whole[0] == 0 and resumed[0] == 14
    assert resumed[1:] == whole[1:]


def ranks_train(rank: int, directory: str, epochs: int) -> list[Any]:
    return train(directory, epochs)


def test_every_rank_has_rank_0s_values(tmp_path: Path) -> None:
    run_ranks(ranks_train, 2, str(tmp_path), 1)
    found = run_ranks(ranks_train, 2, str(tmp_path), 2)
    assert [one[0] for one in found] == [4, 4]
    assert [one[2] for one in found] == ["from rank 0"] * 2


def look_twice(directory: str) -> Any:
    run_one = train(directory, 1)
    try:
        resume_place(directory)
    except UsageError as error:
        return [run_one[0], str(error)]
    return None


def test_place_after_the_session_is_an_error(tmp_path: Path) -> None:
    step, said = run(look_twice, str(tmp_path))
    assert step == 0 and "a second Session" in said


def damaged(directory: str) -> Any:
    newest = newest_intact(JobDirectory.at(directory))
    assert newest is not None
    bad = next(newest.path.glob("modeling/*.safetensors"))
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    return train(directory, 2)[0]


def test_place_is_that_of_the_checkpoint_that_is_loaded(tmp_path: Path) -> None:
    """The newest is damaged: place and Session agree on the one before it."""
    assert run(train, str(tmp_path), 1)[0] == 0
    assert run(damaged, str(tmp_path)) == 8


def train_by_default(directory: str, **options: Any) -> list[tuple[int, str, bool]]:
    auto_interval.FIRST_INTERVAL = OptimalInterval(0.05, "")
    auto_interval.optimal_interval = lambda *_: OptimalInterval(0.05, "")
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.randn(64, 4)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    loader = DataLoader(data, batch_size=2, sampler=ElasticSampler(data, seed=0))
    with Session(directory, model=model, optimizer=optimizer, **options) as session:
        for _ in session.epochs(1):
            for x, y in session.batches(loader):
                (model(x) - y).pow(2).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(0.03)
    seals = [view.manifest for view in list_checkpoints(JobDirectory.at(directory))]
    return [(one.step, one.reason, one.automatic) for one in seals if one is not None]


def test_saves_are_automatic_by_default_and_the_last_two_are_kept(tmp_path: Path) -> None:
    found = run(train_by_default, str(tmp_path))
    assert found[0] == (32, "final", False)
    assert 1 <= len(found[1:]) <= 2 and all(one[1:] == ("interval", True) for one in found[1:])


def test_no_interval_is_none(tmp_path: Path) -> None:
    assert run(partial(train_by_default, save_interval=0), str(tmp_path)) == [(32, "final", False)]


def lines_of(directory: str, epochs: int) -> list[str]:
    said: list[str] = []
    runtime.Runtime.leader_says = lambda _, line: said.append(line)  # type: ignore[method-assign]
    train(directory, epochs)
    return [line for line in said if line.startswith("a step takes")]


def test_other_step_size_is_said_once(tmp_path: Path) -> None:
    """8 samples of two ranks become 4 of one."""
    run_ranks(ranks_train, 2, str(tmp_path), 1)
    [said] = run(lines_of, str(tmp_path), 2)
    assert "4 samples instead of 8" in said
    assert run(lines_of, str(tmp_path), 3) == []
