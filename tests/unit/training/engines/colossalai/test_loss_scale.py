"""The loss scale of fp16: its state is restored, and nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.training.engines.colossalai.loss_scale import (
    find_loss_scale,
    load_loss_scale,
    save_loss_scale,
)


def colossal(scale: float = 256.0, grown: int = 0, overflows: int = 0) -> Any:
    """An optimizer of ColossalAI's, as far as it is looked at."""
    scaler = SimpleNamespace(
        _scale=torch.tensor([scale]), _growth_step=grown, _hysteresis_step=overflows
    )
    scaler.scale = scaler._scale
    return SimpleNamespace(mixed_precision_mixin=SimpleNamespace(grad_scaler=scaler))


class TorchScaler:
    """``GradScaler`` on a machine that has a device."""

    def __init__(self, enabled: bool = True) -> None:
        self.state = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0}
        self.enabled = enabled

    def is_enabled(self) -> bool:
        return self.enabled

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_colossalais_scaler_continues_with_its_counts(tmp_path: Path) -> None:
    scale = find_loss_scale(colossal(32.0, 7, 1))
    assert scale is not None
    save_loss_scale(DiskPart(tmp_path, "0" * 16, 0), scale)
    fresh = colossal()
    found = find_loss_scale(fresh)
    assert found is not None and load_loss_scale(tmp_path, found) == ""
    scaler = fresh.mixed_precision_mixin.grad_scaler
    assert (scaler._scale.item(), scaler._growth_step, scaler._hysteresis_step) == (32.0, 7, 1)


def test_torchs_scaler_continues_and_keeps_its_settings(tmp_path: Path) -> None:
    before = TorchScaler()
    before.state |= {"scale": 512.0, "_growth_tracker": 9}
    scale = find_loss_scale(SimpleNamespace(scaler=before))
    assert scale is not None
    save_loss_scale(DiskPart(tmp_path, "0" * 16, 0), scale)
    after = TorchScaler()
    after.state["growth_factor"] = 4.0
    found = find_loss_scale(SimpleNamespace(scaler=after))
    assert found is not None and load_loss_scale(tmp_path, found) == ""
    assert after.state == {"scale": 512.0, "growth_factor": 4.0, "_growth_tracker": 9}


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(mixed_precision_mixin=None),
        SimpleNamespace(mixed_precision_mixin=SimpleNamespace()),  # bf16's
        SimpleNamespace(scaler=TorchScaler(enabled=False)),
    ],
)
def test_an_optimizer_without_a_dynamic_scale_has_none(optimizer: Any) -> None:
    assert find_loss_scale(optimizer) is None


def test_a_checkpoint_without_a_scale_is_reported(tmp_path: Path) -> None:
    scale = find_loss_scale(colossal())
    assert scale is not None
    assert load_loss_scale(tmp_path, scale) == "the checkpoint has no loss scale"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b'{"scale": "1", "growth_step": 0}', b'{"scale": 0, "growth_step": 0}',
        b'{"scale": -1, "growth_step": 0}', b'{"scale": 1, "growth_step": -1}',
        b'{"scale": 1e999, "growth_step": 0}', b'{"growth_step": 0}',
    ],
)  # fmt: skip
def test_an_invalid_scale_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision/loss_scale.json").write_bytes(content)
    scale = find_loss_scale(colossal())
    assert scale is not None
    with pytest.raises(CheckpointRejected):
        load_loss_scale(tmp_path, scale)
