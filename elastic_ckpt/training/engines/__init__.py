"""What writes and reads model and optimizer state, behind one small interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from elastic_ckpt.checkpoint.manifest import EngineInfo
from elastic_ckpt.checkpoint.part import Part
from elastic_ckpt.training.tensors.device_copy import DeviceCopies


class Engine(Protocol):
    """Writes the state of model, optimizer and scheduler below a directory, and reads it back.

    Saving and loading are called on every rank and may be collective.
    """

    info: EngineInfo

    @property
    def overlaps(self) -> bool:
        """Whether ``save`` makes use of ``copies``; the same on every rank."""

    def save(self, directory: Path, part: Part, copies: DeviceCopies | None = None) -> None:
        """Write everything; it is complete when every rank has returned.

        What goes through ``part`` is hashed on the way and made durable. Other files below
        ``directory`` are found and claimed afterwards, with a second pass over their bytes.

        Args:
            copies: may take what nothing but the optimizer's step writes to; it is finished before
                the seal. None: all that is saved may be changed when this returns.
        """

    def check(self, directory: Path, rank: int) -> None:
        """See that nothing was left out, once every rank's save has returned. Not collective.

        Raises:
            SaveFailed: something was.
        """

    def load(self, directory: Path) -> str:
        """Restore everything from a checkpoint that was verified in full.

        Returns:
            What could not be restored to the bit, and why; empty if all was.
        """

    def state_bytes(self) -> int:
        """About how many bytes a save will write, as far as this rank knows. Not collective."""


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        return sum(tensor_bytes(value) for value in tree.values())
    if isinstance(tree, list | tuple):
        return sum(tensor_bytes(value) for value in tree)
    return getattr(tree, "nbytes", 0) if hasattr(tree, "element_size") else 0


def make_engine(
    booster: Any, model: Any, optimizer: Any, lr_scheduler: Any, *, use_async: bool = False
) -> Engine:
    """ColossalAI's engine where there is a booster, torch's own otherwise.

    Args:
        use_async: as :class:`ColossalAIEngine` has it; torch's own needs no such thing.
    """
    if booster is None:
        from elastic_ckpt.training.engines.torch.engine import TorchEngine

        return TorchEngine(model, optimizer, lr_scheduler)
    from elastic_ckpt.training.engines.colossalai.engine import ColossalAIEngine

    return ColossalAIEngine(booster, model, optimizer, lr_scheduler, use_async=use_async)
