"""The loss scale of fp16, which ColossalAI's checkpoints do not contain.

A run that restarts with the initial scale skips steps until it has found the right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import torch

from elastic_ckpt.checkpoint.tier import Part
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.util.text import printable

_NAME: Final = "precision/loss_scale.json"
_MAX_BYTES: Final = 64 * 1024
_MIXINS: Final = ("mixed_precision_mixin", "mixed_precision", "mix_precision_mixin")
"""The attributes of ZeRO's, the hybrid plugin's and Gemini's optimizers with the scaler."""


class _Saved(msgspec.Struct, frozen=True):
    scale: float
    growth_step: int
    hysteresis_step: int = 0


class LossScale(Protocol):
    """A kind of scaler."""

    def state(self) -> _Saved:
        """Return the current state."""

    def restore(self, saved: _Saved) -> None:
        """Continue from a saved state."""


@dataclass
class _OfColossalAI:
    """ColossalAI's scaler, whose own ``state_dict`` lacks the number of good steps."""

    scaler: Any

    def state(self) -> _Saved:
        scaler = self.scaler
        return _Saved(float(scaler.scale.item()), scaler._growth_step, scaler._hysteresis_step)

    def restore(self, saved: _Saved) -> None:
        scaler = self.scaler
        scaler._scale = torch.full_like(scaler.scale, saved.scale)
        scaler._growth_step, scaler._hysteresis_step = saved.growth_step, saved.hysteresis_step


@dataclass
class _OfTorch:
    """``torch.amp.GradScaler``, which TorchDDP uses for fp16."""

    scaler: Any

    def state(self) -> _Saved:
        state = self.scaler.state_dict()
        return _Saved(float(state["scale"]), int(state["_growth_tracker"]))

    def restore(self, saved: _Saved) -> None:
        own = self.scaler.state_dict()
        own.update(scale=saved.scale, _growth_tracker=saved.growth_step)
        self.scaler.load_state_dict(own)


def find_loss_scale(optimizer: Any) -> LossScale | None:
    """Return the scaler of a boosted optimizer, if it has a dynamic one."""
    for name in _MIXINS:
        scaler = getattr(getattr(optimizer, name, None), "grad_scaler", None)
        if hasattr(scaler, "_growth_step"):
            return _OfColossalAI(scaler)
    scaler = getattr(optimizer, "scaler", None)
    return _OfTorch(scaler) if scaler is not None and scaler.is_enabled() else None


def save_loss_scale(part: Part, scale: LossScale) -> None:
    """Save the state; one rank does, as all have the same."""
    part.write(_NAME, msgspec.json.encode(scale.state()))


def load_loss_scale(checkpoint: Path, scale: LossScale) -> str:
    """Restore the state, or return why it was not restored. CheckpointRejected if what was saved is
    not a loss scale."""
    try:
        saved = msgspec.json.decode(read_bounded(checkpoint / _NAME, _MAX_BYTES), type=_Saved)
    except FileNotFoundError:
        return "the checkpoint has no loss scale"
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointRejected(f"{_NAME} is not readable: {printable(str(error), 200)}") from None
    if not 0 < saved.scale < float("inf") or min(saved.growth_step, saved.hysteresis_step) < 0:
        raise CheckpointRejected(f"{_NAME} is not a loss scale")
    scale.restore(saved)
    return ""
