"""The loss scale of fp16, which ColossalAI leaves out of its checkpoints.

A run that begins again with the first scale skips steps until it has found the right one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import torch

from elastic_ckpt.checkpoint.disk.part import Part
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.util.text import printable

_NAME: Final = "precision/loss_scale.json"
_MAX_BYTES: Final = 64 * 1024
_MIXINS: Final = ("mixed_precision_mixin", "mixed_precision", "mix_precision_mixin")
"""What ZeRO's, the hybrid plugin's and Gemini's optimizer call what holds their scaler."""


class _Saved(msgspec.Struct, frozen=True):
    scale: float
    growth_step: int
    hysteresis_step: int = 0


class LossScale(Protocol):
    """One kind of scaler."""

    def state(self) -> _Saved:
        """What it has come to."""

    def restore(self, saved: _Saved) -> None:
        """Go on from there."""


class _OfColossalAI:
    """Its own ``state_dict`` leaves out how many steps went well."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    def state(self) -> _Saved:
        """What it has come to."""
        scaler = self._scaler
        return _Saved(float(scaler.scale.item()), scaler._growth_step, scaler._hysteresis_step)

    def restore(self, saved: _Saved) -> None:
        """Go on from there."""
        scaler = self._scaler
        scaler._scale = torch.full_like(scaler.scale, saved.scale)
        scaler._growth_step, scaler._hysteresis_step = saved.growth_step, saved.hysteresis_step


class _OfTorch:
    """``torch.amp.GradScaler``, which TorchDDP uses for fp16."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    def state(self) -> _Saved:
        """What it has come to."""
        state = self._scaler.state_dict()
        return _Saved(float(state["scale"]), int(state["_growth_tracker"]))

    def restore(self, saved: _Saved) -> None:
        """Go on from there."""
        own = self._scaler.state_dict()
        own.update(scale=saved.scale, _growth_tracker=saved.growth_step)
        self._scaler.load_state_dict(own)


def find_loss_scale(optimizer: Any) -> LossScale | None:
    """That of a boosted optimizer, if it has one that changes."""
    for name in _MIXINS:
        scaler = getattr(getattr(optimizer, name, None), "grad_scaler", None)
        if hasattr(scaler, "_growth_step"):
            return _OfColossalAI(scaler)
    scaler = getattr(optimizer, "scaler", None)
    return _OfTorch(scaler) if scaler is not None and scaler.is_enabled() else None


def save_loss_scale(part: Part, scale: LossScale) -> None:
    """Write it; by one rank, as all have the same."""
    part.write(_NAME, msgspec.json.encode(scale.state()))


def load_loss_scale(checkpoint: Path, scale: LossScale) -> str:
    """Put it back.

    Returns:
        Why it stays as it is; empty if it was put back.

    Raises:
        CheckpointRejected: what was saved is none.
    """
    try:
        saved = msgspec.json.decode(read_bounded(checkpoint / _NAME, _MAX_BYTES), type=_Saved)
    except FileNotFoundError:
        return "there is no loss scale"
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointRejected(f"{_NAME} is not readable: {printable(str(error), 200)}") from None
    if not 0 < saved.scale < float("inf") or min(saved.growth_step, saved.hysteresis_step) < 0:
        raise CheckpointRejected(f"{_NAME} holds no loss scale")
    scale.restore(saved)
    return ""
