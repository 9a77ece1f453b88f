"""ColossalAI: the booster writes its own layout, readable by plain ColossalAI."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import colossalai
import torch
from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPCheckpointIO
from colossalai.checkpoint_io import GeneralCheckpointIO
from torch import distributed

from elastic_ckpt.core.manifest import EngineInfo
from elastic_ckpt.core.text import printable
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.store.files import open_regular
from elastic_ckpt.store.part import Part
from elastic_ckpt.store.shard_names import shard_names
from elastic_ckpt.training.device_copy import DeviceCopies
from elastic_ckpt.training.engines import tensor_bytes
from elastic_ckpt.training.shares import Shares, count_writers
from elastic_ckpt.training.torch_save import torch_save_through

_FORCE_WEIGHTS_ONLY: Final = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_ARCHIVE: Final = b"PK\x03\x04"
"""How a file begins that torch has written since 1.6."""

dist: Any = distributed
"""As in :mod:`elastic_ckpt.training.peers`."""


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

    overlaps = False

    def save(self, directory: Path, part: Part, copies: DeviceCopies | None = None) -> None:
        """Collective for some plugins, so every rank calls it always; ``copies`` is not used."""
        booster = self._booster
        if self._has_replicas():
            self._save_shared(directory, part)
        else:
            with torch_save_through(directory, part):
                self._save_state(booster, self._model, self._optimizer, directory)
        if self._lr_scheduler is not None:
            with torch_save_through(directory, part):
                booster.save_lr_scheduler(self._lr_scheduler, str(directory / "lr_scheduler"))

    def load(self, directory: Path) -> None:
        """Collective for some plugins; nothing but tensors and plain values is unpickled."""
        booster = self._booster
        _check_indexes(directory)
        with weights_only(directory):
            booster.load_model(self._model, str(directory / "modeling"))
            if self._optimizer is not None:
                booster.load_optimizer(self._optimizer, str(directory / "optimizer"))
            if self._lr_scheduler is not None:
                booster.load_lr_scheduler(self._lr_scheduler, str(directory / "lr_scheduler"))

    def state_bytes(self) -> int:
        """Counts this rank's tensors; exact where every rank holds all of the state."""
        optimizer = getattr(self._optimizer, "optim", self._optimizer)  # a wrapper has no state
        state = getattr(optimizer, "state", None) or {}
        return tensor_bytes(list(self._model.parameters())) + tensor_bytes(list(state.values()))

    def _has_replicas(self) -> bool:
        """Whether every rank holds all of the state, and the plugin lets rank 0 alone write it."""
        saver = type(self._booster.checkpoint_io)
        return saver is TorchDDPCheckpointIO and dist.is_initialized() and dist.get_world_size() > 1

    def _save_shared(self, directory: Path, part: Part) -> None:
        """Walk through the same save on each rank, and write a share of its files."""
        shares = Shares(part.rank, count_writers())
        try:
            if shares.has_part:
                self._write_share(directory, part, shares)
        except Exception:
            with contextlib.suppress(RuntimeError):  # a peer has gone: this error says more
                shares.compare(failed=True)
            raise
        shares.compare()

    def _write_share(self, directory: Path, part: Part, shares: Shares) -> None:
        model = self._model.unwrap()
        optimizer = self._optimizer.unwrap() if self._optimizer is not None else None
        # The replicas' buffers differ between one forward pass and the next.
        buffers = {name for name, _ in model.named_buffers()}

        def takes(path: str, obj: Any, size: int) -> bool:
            own = isinstance(obj, Mapping) and not buffers.isdisjoint(obj)
            return shares.takes(path, size, shared=not own)

        with contextlib.ExitStack() as stack:
            if part.rank != 0:  # what else the booster writes, an index, is there once
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(torch_save_through(directory, part, takes))
            self._save_state(GeneralCheckpointIO(), model, optimizer, directory)

    def _save_state(self, saver: Any, model: Any, optimizer: Any, directory: Path) -> None:
        saver.save_model(model, str(directory / "modeling"), shard=True)
        if optimizer is not None:
            saver.save_optimizer(optimizer, str(directory / "optimizer"), shard=True)


@contextmanager
def weights_only(directory: Path) -> Iterator[None]:
    """Make every ``torch.load`` inside refuse code, whatever its caller asked for.

    Files outside of ``directory`` are refused, too, and so are two kinds that torch 2.5 reads
    with no regard for ``weights_only``: TorchScript, and what versions before 1.6 wrote.
    """
    plain, plain_script = torch.load, torch.jit.load
    root = os.path.realpath(directory)

    def load(f: Any, *args: Any, **options: Any) -> Any:
        if isinstance(f, str | os.PathLike):
            _check_archive(os.fspath(f), root)
        return plain(f, *args, **{**options, "weights_only": True})

    before = os.environ.get(_FORCE_WEIGHTS_ONLY)
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    torch.load, torch.jit.load = load, _refuse_script
    try:
        yield
    finally:
        torch.load, torch.jit.load = plain, plain_script
        if before is None:
            del os.environ[_FORCE_WEIGHTS_ONLY]
        else:
            os.environ[_FORCE_WEIGHTS_ONLY] = before


def _check_archive(path: str, root: str) -> None:
    if not os.path.realpath(path).startswith(root + os.sep):
        raise CheckpointRejected(f"{printable(path)} is outside of the checkpoint")
    fd = open_regular(Path(path))
    try:
        if os.read(fd, len(_ARCHIVE)) != _ARCHIVE:
            raise CheckpointRejected(f"{os.path.basename(path)} is no archive of tensors")
    finally:
        os.close(fd)


def _refuse_script(*_: Any, **__: Any) -> NoReturn:
    raise CheckpointRejected("a file of the checkpoint holds TorchScript, which is code")


def _check_indexes(directory: Path) -> None:
    """ColossalAI opens what an index names: that must be in the checkpoint, and so verified."""
    for part in ("modeling", "optimizer"):
        for path in sorted((directory / part).glob("*.json")):
            shard_names(path)


def mend_cpu_accelerator() -> None:
    """Let ColossalAI load an optimizer without a GPU.

    Its CPU accelerator raises in ``synchronize``, where there is nothing to wait for. Does
    nothing where there is a CUDA device.
    """
    if torch.cuda.is_available():
        return
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    CpuAccelerator.synchronize = lambda self, device=None: None
