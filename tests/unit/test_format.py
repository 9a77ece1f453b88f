"""A checkpoint that an earlier version wrote stays readable, and the documented reader reads it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_ckpt.core.manifest import EngineInfo
from elastic_ckpt.store.running_states import RunningStates, read_running_states
from elastic_ckpt.store.verify import verify_full
from elastic_ckpt.training.state_codec import read_state
from tests.unit.store_tools import flip_bit

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "fixtures" / "format-1" / "epoch-0_step-4"


def documented_reader() -> Callable[[Path], dict[str, Any]]:
    text = (ROOT.parent / "docs" / "format.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    found: Callable[[Path], dict[str, Any]] = names["check"]
    return found


def test_a_checkpoint_of_format_1_is_valid() -> None:
    manifest = verify_full(FIXTURE)
    assert (manifest.format, manifest.epoch, manifest.step) == (1, 0, 4)
    assert (manifest.step_in_epoch, manifest.sample_start_index) == (4, 8)
    assert (manifest.samples_per_step, manifest.order_seed, manifest.dataset_size) == (2, 3, 12)
    assert (manifest.reason, manifest.job, manifest.world_size) == ("interval", "fixture", 1)
    assert manifest.engine == EngineInfo("torch", "2.5.1+cu124", "module", "float32")
    assert manifest.metrics == {"loss": 6.631572246551514}
    assert read_running_states(FIXTURE) == RunningStates(0, 4, 8)


def test_its_state_is_read() -> None:
    model = read_state(FIXTURE / "modeling", "state")
    optimizer = read_state(FIXTURE / "optimizer", "state")
    assert torch.equal(model["weight"], torch.tensor([[0.4937579333782196]]))
    assert optimizer["state"][0]["step"] == 4
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.999)
    rank = read_state(FIXTURE / "ranks", "00000")
    assert rank["extra"]["note"] == {"words": ("a", b"b", 0.1)}
    assert rank["iterating"] is True and "python" in rank["rng"]


def test_the_documented_reader_agrees() -> None:
    assert documented_reader()(FIXTURE)["step"] == 4


@pytest.mark.parametrize("name", ["manifest.json", "modeling/state.safetensors"])
def test_the_documented_reader_finds_damage(tmp_path: Path, name: str) -> None:
    shutil.copytree(FIXTURE, tmp_path / FIXTURE.name)
    flip_bit(tmp_path / FIXTURE.name / name)
    with pytest.raises((AssertionError, ValueError)):
        documented_reader()(tmp_path / FIXTURE.name)
