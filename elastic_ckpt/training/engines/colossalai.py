"""ColossalAI: the booster writes its own layout, readable by plain ColossalAI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import colossalai
import torch

from elastic_ckpt.core.manifest import EngineInfo
from elastic_ckpt.store.part import PartWriter
from elastic_ckpt.training.engines import tensor_bytes

_FORCE_WEIGHTS_ONLY: Final = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class ColossalAIEngine:
    """Saves through a ``Booster``; optimizer and scheduler may be None."""

    def __init__(self, booster: Any, model: Any, optimizer: Any, lr_scheduler: Any) -> None:
        mend_cpu_accelerator()
        self._booster = booster
        self._model = model
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        plugin = booster.plugin
        self.info = EngineInfo(
            name="colossalai",
            version=str(getattr(colossalai, "__version__", "")),
            plugin=type(plugin).__name__,
            precision=str(getattr(plugin, "precision", None) or "fp32"),
        )

    def save(self, directory: Path, part: PartWriter) -> None:
        """Collective for some plugins, so every rank calls it always."""
        booster = self._booster
        with hashed_torch_save(directory, part):
            booster.save_model(self._model, str(directory / "modeling"), shard=True)
            if self._optimizer is not None:
                booster.save_optimizer(self._optimizer, str(directory / "optimizer"), shard=True)
            if self._lr_scheduler is not None:
                booster.save_lr_scheduler(self._lr_scheduler, str(directory / "lr_scheduler"))

    def load(self, directory: Path) -> None:
        """Collective for some plugins; nothing but tensors and plain values is unpickled."""
        booster = self._booster
        with weights_only():
            booster.load_model(self._model, str(directory / "modeling"))
            if self._optimizer is not None:
                booster.load_optimizer(self._optimizer, str(directory / "optimizer"))
            if self._lr_scheduler is not None:
                booster.load_lr_scheduler(self._lr_scheduler, str(directory / "lr_scheduler"))

    def state_bytes(self) -> int:
        """Counts this rank's tensors; exact where every rank holds all of the state."""
        state = getattr(self._optimizer, "state", None) or {}
        return tensor_bytes(list(self._model.parameters())) + tensor_bytes(list(state.values()))


@contextmanager
def hashed_torch_save(directory: Path, part: PartWriter) -> Iterator[None]:
    """Have every ``torch.save`` to a path below ``directory`` write through ``part``.

    ColossalAI names files, it does not open them; ``torch.save`` takes an open file as well.
    """
    plain = torch.save
    root = os.path.abspath(directory)

    def save(obj: Any, f: Any, *args: Any, **options: Any) -> None:
        path = os.path.abspath(f) if isinstance(f, str | os.PathLike) else ""
        if not path.startswith(root + os.sep) or os.path.lexists(path):
            plain(obj, f, *args, **options)
            return
        with part.open(os.path.relpath(path, root)) as file:
            stream: Any = file  # torch asks for less than a whole file
            plain(obj, stream, *args, **options)

    torch.save = save
    try:
        yield
    finally:
        torch.save = plain


@contextmanager
def weights_only() -> Iterator[None]:
    """Make every ``torch.load`` inside refuse code, whatever its caller asked for."""
    before = os.environ.get(_FORCE_WEIGHTS_ONLY)
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE_WEIGHTS_ONLY]
        else:
            os.environ[_FORCE_WEIGHTS_ONLY] = before


def mend_cpu_accelerator() -> None:
    """Let ColossalAI load an optimizer without a GPU.

    Its CPU accelerator raises in ``synchronize``, where there is nothing to wait for. Does
    nothing where there is a CUDA device.
    """
    if torch.cuda.is_available():
        return
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    CpuAccelerator.synchronize = lambda self, device=None: None
