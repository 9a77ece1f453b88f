"""Saves whose copies overlap the next step, on real ranks, with the latest possible device.

There is no device: what the ranks hold in their own memory is taken for a device's, and the copies
are made at the last moment at which a device would have to have made them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session
from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import read_journal
from elastic_ckpt.protocol.agreement import RequestAnswer, RequestKind
from elastic_ckpt.training.engines.torch import engine as engines
from elastic_ckpt.training.engines.torch.engine import TorchEngine
from elastic_ckpt.training.runtime import join
from elastic_ckpt.training.state import save as saving
from elastic_ckpt.training.tensors import safetensors_file as tensor_file
from elastic_ckpt.training.tensors.device_copy import DeviceCopies
from tests.integration.ranks import run_ranks
from tests.unit.training.tensors.test_device_copy import LateLane, bits

STEPS = 12
EVERY = 2


def take_memory_for_a_device() -> None:
    def on_device(tensor: torch.Tensor) -> bool:
        return True

    tensor_file.is_on_device = engines.is_on_device = on_device  # type: ignore[assignment]
    saving.DeviceCopies = lambda: DeviceCopies(LateLane)  # type: ignore[assignment, misc]


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.Linear(8, 200), nn.Linear(200, 200), nn.BatchNorm1d(200))
    return inner, torch.optim.AdamW(inner.parameters(), lr=0.01)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    found = {name: bits(value) for name, value in model.state_dict().items()}
    for number, held in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": bits(value) for name, value in held.items()}
    return found


def train(rank: int, directory: str, place: str, writes_at: int, stop_at: int) -> list[Any]:
    """Steps, and whether each checkpoint that is sealed in memory holds the state of its step.

    Args:
        writes_at: the step that begins with the script's writing to a parameter; 0 for none.
        stop_at: the step that a notice comes in; 0 for none.
    """
    take_memory_for_a_device()
    runtime = join(directory)
    tier = MemoryTier(Path(place))
    runtime.memory = tier
    bare, optimizer = build(seed=3)
    model = nn.parallel.DistributedDataParallel(bare)
    data = TensorDataset(torch.randn(STEPS * 8, 8))
    loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data, seed=0))
    expected: dict[int, dict[str, bytes]] = {}
    found: list[Any] = []

    def look() -> None:
        for held in tier.sealed():
            if rank == 0 and not held.settled:
                held.generation.settle(held.seal)  # as if the disk had it by now
                found.append((held.seal.step, held.seal.reason, is_intact(held)))

    def is_intact(held: Sealed) -> bool:
        model, optimizer = build(seed=9)
        TorchEngine(model, optimizer, None).load(held.generation.path)
        return state(model, optimizer) == expected[held.seal.step]

    try:
        with Session(directory, model=model, optimizer=optimizer, save_interval=EVERY) as session:
            for _ in session.epochs(1):
                for (batch,) in session.batches(loader):
                    if session.step + 1 == writes_at:
                        with torch.no_grad():
                            bare[1].weight.mul_(1.0001)
                    loss = model(batch).pow(2).mean()
                    loss.backward()
                    if session.step + 1 == stop_at:
                        runtime.board.raise_flag(1)
                        runtime.board.post_answer(RequestAnswer(1, RequestKind.STOP, stop_at))
                    optimizer.step()
                    optimizer.zero_grad()
                    expected[session.step + 1] = state(bare, optimizer)
                    look()
    finally:
        look()
    return found


def intervals(*steps: int) -> list[tuple[int, str, bool]]:
    return [(step, "interval", True) for step in steps]


def journal(directory: Path) -> list[tuple[str, int]]:
    events = read_journal(JobDirectory(directory))
    kinds = ("saved", "save_failed")
    return [(event.name, int(event.data["step"])) for event in events if event.name in kinds]


@pytest.fixture
def tier(tmp_path: Path) -> str:
    (tmp_path / "tier").mkdir()
    return str(tmp_path / "tier")


def test_overlapped_save_holds_the_state_of_its_own_step(tmp_path: Path, tier: str) -> None:
    found, _ = run_ranks(train, 2, str(tmp_path / "job"), tier, 0, 0)
    assert sorted(found) == [*intervals(2, 4, 6, 8, 10), (12, "final", True), *intervals(12)]


def test_write_to_a_parameter_during_a_copy_abandons_that_save(tmp_path: Path, tier: str) -> None:
    """Step 4's is given up, step 5 is saved instead, and from then on training stands still."""
    found, _ = run_ranks(train, 2, str(tmp_path / "job"), tier, 5, 0)
    assert sorted(found) == [*intervals(2, 5, 6, 8, 10), (12, "final", True), *intervals(12)]
    assert ("save_failed", 4) in journal(tmp_path / "job")


def test_stop_during_an_overlapped_save_seals_it_first(tmp_path: Path, tier: str) -> None:
    codes = run_ranks(train, 2, str(tmp_path / "job"), tier, 0, 6)
    assert codes == [75, 75]
    newest = MemoryTier(Path(tier)).newest()
    assert newest is not None and newest.key == (0, 6)
    assert journal(tmp_path / "job") == [("saved", step) for step in (2, 4, 6)]
