"""A checkpoint that an earlier version wrote stays readable, and the documented reader reads it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastic_ckpt.checkpoint.colossalai_layout import RunningStates, read_running_states
from elastic_ckpt.checkpoint.manifest import EngineInfo
from elastic_ckpt.checkpoint.verify import verify_full
from elastic_ckpt.training.engines.torch.engine import TorchEngine
from elastic_ckpt.training.tensors.state_codec import read_state
from tests.checkpoints import flip_bit
from tests.unit.training.tensors.test_shard_reader import LAYOUTS, save, table

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "fixtures" / "format-1" / "epoch-0_step-4"


def documented(name: str) -> Callable[..., Any]:
    """A function of the readers that the documentation shows."""
    text = (ROOT.parent / "docs" / "format.md").read_text()
    names: dict[str, Any] = {}
    exec("".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    found: Callable[..., Any] = names[name]
    return found


def test_a_checkpoint_of_format_1_is_valid() -> None:
    manifest = verify_full(FIXTURE)
    assert (manifest.format, manifest.epoch, manifest.step) == (1, 0, 4)
    assert (manifest.step_in_epoch, manifest.sample_start_index) == (4, 8)
    assert (manifest.samples_per_step, manifest.order_seed, manifest.dataset_size) == (2, 3, 12)
    assert (manifest.reason, manifest.job, manifest.world_size) == ("interval", "fixture", 1)
    assert manifest.engine == EngineInfo("torch", "2.13.0+cpu", "module", "float32")
    assert manifest.metrics == {"loss": 43.19110107421875}
    assert read_running_states(FIXTURE) == RunningStates(0, 4, 8)


@pytest.mark.parametrize(("name", "written"), [("order-1", (1, 1)), ("format-2", (2, 2))])
def test_a_checkpoint_has_a_format_and_an_order(name: str, written: tuple[int, int]) -> None:
    path = ROOT / "fixtures" / name / "epoch-0_step-4"
    manifest = verify_full(path)
    assert (manifest.format, manifest.order_version) == written
    assert (manifest.order_seed, manifest.dataset_size) == (3, 5000)
    assert documented("check")(path)["step"] == 4


def test_its_state_is_read() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=9.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 9)
    TorchEngine(model, optimizer, scheduler).load(FIXTURE)
    assert (model.weight.item(), model.bias.item()) == (-0.9698419570922852, -0.7669014930725098)
    assert optimizer.state[model.weight]["step"] == 4
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert (scheduler.last_epoch, scheduler.step_size) == (4, 2)
    rank = read_state(FIXTURE / "ranks", "00000")
    assert rank["extra"]["note"] == {"words": ("a", b"b", 0.1)}
    assert rank["iterating"] is True and "python" in rank["rng"]


def test_the_documented_reader_agrees() -> None:
    assert documented("check")(FIXTURE)["step"] == 4


def test_the_documented_reader_puts_a_tensor_together(tmp_path: Path) -> None:
    assert documented("tensor")(FIXTURE / "modeling", "weight").tolist() == [[-0.9698419570922852]]
    assert documented("tensor")(FIXTURE / "optimizer", "state.weight.step") == 4
    for shared in (False, True):
        place = tmp_path / str(shared)
        place.mkdir()
        save(place, {"w": (table(), LAYOUTS["boxes"])}, shared=shared)
        assert documented("tensor")(place, "w").tolist() == table().tolist()


@pytest.mark.parametrize("name", ["manifest.json", "modeling/00000.safetensors"])
def test_the_documented_reader_finds_damage(tmp_path: Path, name: str) -> None:
    shutil.copytree(FIXTURE, tmp_path / FIXTURE.name)
    flip_bit(tmp_path / FIXTURE.name / name)
    with pytest.raises((AssertionError, ValueError)):
        documented("check")(tmp_path / FIXTURE.name)
