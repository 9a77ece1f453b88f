"""ColossalAI: the booster writes its own layout, which plain ColossalAI can read."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import colossalai
from colossalai.booster.plugin.gemini_plugin import GeminiCheckpointIO
from colossalai.booster.plugin.low_level_zero_plugin import LowLevelZeroCheckpointIO
from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPCheckpointIO
from colossalai.booster.plugin.torch_fsdp_plugin import TorchFSDPCheckpointIO, TorchFSDPModel
from colossalai.checkpoint_io import GeneralCheckpointIO, HybridParallelCheckpointIO
from colossalai.utils import safetensors as nested
from torch import distributed

from elastic_ckpt.checkpoint.manifest import EngineInfo
from elastic_ckpt.checkpoint.tier import Part
from elastic_ckpt.errors import CheckpointError, CheckpointRejected, SaveFailed
from elastic_ckpt.training.engines import Engine, EngineInputs
from elastic_ckpt.training.engines.colossalai import coverage
from elastic_ckpt.training.engines.colossalai.cpu_shim import patch_loads
from elastic_ckpt.training.engines.colossalai.loss_scale import (
    find_loss_scale,
    load_loss_scale,
    save_loss_scale,
)
from elastic_ckpt.training.engines.colossalai.masters import (
    Piece,
    find_pieces,
    load_masters,
    save_masters,
)
from elastic_ckpt.training.engines.colossalai.replica_writers import ReplicaWriters, count_writers
from elastic_ckpt.training.engines.colossalai.torch_archive import torch_save_through
from elastic_ckpt.training.engines.colossalai.weights_only import PlainUnpickler, weights_only
from elastic_ckpt.training.engines.colossalai.whole_size import whole_bytes
from elastic_ckpt.training.tensors.device_copy import DeviceCopies

dist: Any = distributed
"""As in :mod:`elastic_ckpt.training.ranks.peers`."""


_ALONE: Final = (
    TorchDDPCheckpointIO,
    LowLevelZeroCheckpointIO,
    TorchFSDPCheckpointIO,
    GeminiCheckpointIO,
)
"""What has rank 0 write all of ColossalAI's files, and reads none of them."""


class ColossalAIEngine(Engine):
    """Saves through a ``Booster``; with ``use_async`` TensorNVMe's threads write, and it waits."""

    def __init__(self, inputs: EngineInputs) -> None:
        patch_loads()
        self._use_async = inputs.use_async and hasattr(nested, "AsyncFileWriter")
        if inputs.use_async and not self._use_async:
            warnings.warn(
                "use_async needs TensorNVMe's async_file_io, which is not installed: saves use the "
                "memory tier instead, if there is one",
                stacklevel=2,
            )
        self._booster = inputs.booster
        self._model = inputs.model
        self._optimizer = inputs.optimizer
        self._lr_scheduler = inputs.lr_scheduler
        plugin = inputs.booster.plugin
        self.info = EngineInfo(
            name="colossalai",
            version=str(getattr(colossalai, "__version__", "")),
            plugin=type(plugin).__name__,
            precision=str(getattr(plugin, "precision", None) or "fp32"),
        )

    def save(self, directory: Path, part: Part, copies: DeviceCopies | None = None) -> None:
        """Save through the booster. Collective for some plugins; ``copies`` is not used."""
        booster = self._booster
        if self._use_async:
            self._save_async(directory)
        elif self._has_replicas():
            self._save_shared(directory, part)
        else:
            with torch_save_through(directory, part):
                self._save_state(booster, self._model, self._optimizer, directory)
        if self._lr_scheduler is not None:
            with torch_save_through(directory, part):
                booster.save_lr_scheduler(self._lr_scheduler, str(directory / "lr_scheduler"))
        save_masters(part, self._pieces())
        scale = find_loss_scale(self._optimizer)
        if scale is not None and part.rank == 0:
            save_loss_scale(part, scale)

    def check(self, directory: Path, rank: int) -> None:
        """Check that the booster left nothing out. Only rank 0 requires that it sees the index:
        another node's memory has none, and its ranks hold the same parameters.

        Raises:
            SaveFailed: something is missing.
        """
        for kind, wanted in self._wanted(states=True):
            index = coverage.open_index(directory, kind)
            missing = f"{kind}/'s index" if rank == 0 else ""
            if index is not None:
                missing = coverage.what_is_missing(directory, kind, index, wanted)
            if missing:
                raise SaveFailed(rank, f"ColossalAI left out {missing}")

    def load(self, directory: Path) -> str:
        """Load through the booster, without code. Collective for some plugins."""
        booster = self._booster
        self._check_fits(directory)
        with weights_only(directory), plain_objects():
            booster.load_model(self._model, str(directory / "modeling"))
            if self._optimizer is not None:
                booster.load_optimizer(self._optimizer, str(directory / "optimizer"))
            if self._lr_scheduler is not None:
                booster.load_lr_scheduler(self._lr_scheduler, str(directory / "lr_scheduler"))
        lost = []
        rebuilt = load_masters(directory, self._pieces())
        if rebuilt:
            lost.append(f"the fp32 master weights were made from the rounded weights: {rebuilt}")
        scale = find_loss_scale(self._optimizer)
        if scale is not None:
            lost.append(load_loss_scale(directory, scale))
        return "; ".join(filter(None, lost))

    def state_bytes(self) -> int:
        """Count this rank's tensors, and as many for each rank that holds other shards."""
        return whole_bytes(self._booster.plugin, self._model, self._optimizer, self._pieces())

    @property
    def reads_peers_files(self) -> bool:
        """Whether rank 0 merges the indexes of stages or experts; true of unknown plugins."""
        saver = self._booster.checkpoint_io
        if type(saver) is HybridParallelCheckpointIO:
            return bool(saver.pp_size > 1)
        return type(saver) not in _ALONE

    def _pieces(self) -> list[Piece]:
        return find_pieces(self._booster.plugin, self._model, self._optimizer)

    def _wanted(self, *, states: bool) -> Iterator[tuple[coverage.Kind, list[str]]]:
        """Yield what must be in which index, as far as this rank knows."""
        flat = isinstance(self._model, TorchFSDPModel)  # has no parameters by their own names
        yield "modeling", [] if flat else coverage.parameter_names(self._model.unwrap())
        if self._optimizer is not None:
            known = states and not flat and not hasattr(self._optimizer, "chunk16_set")
            yield "optimizer", coverage.state_numbers(self._optimizer) if known else []

    def _check_fits(self, directory: Path) -> None:
        """Check the indexes first, as ColossalAI silently skips what they do not name."""
        for kind, wanted in self._wanted(states=False):
            index = coverage.open_index(directory, kind)
            if index is None:
                raise CheckpointRejected(f"{kind}/ has no index: was it saved with shard=True?")
            missing = coverage.what_is_missing(directory, kind, index, wanted)
            if missing:
                raise CheckpointError(
                    f"the script's model does not fit {directory.name}, which lacks {missing}: use "
                    "the script that saved it, or start over with a new --dir"
                )

    def _has_replicas(self) -> bool:
        """Return whether every rank holds the whole state and the plugin has rank 0 write it."""
        saver = type(self._booster.checkpoint_io)
        return saver is TorchDDPCheckpointIO and dist.is_initialized() and dist.get_world_size() > 1

    def _save_async(self, directory: Path) -> None:
        """Save with TensorNVMe, and wait for its writers: their files are incomplete until then."""
        options = {"shard": True, "use_async": True}
        self._booster.save_model(self._model, str(directory / "modeling"), **options)
        if self._optimizer is not None:
            self._booster.save_optimizer(self._optimizer, str(directory / "optimizer"), **options)
        self._booster.checkpoint_io._sync_io()

    def _save_shared(self, directory: Path, part: Part) -> None:
        """Run the same save on each rank, and write a share of its files."""
        writers = ReplicaWriters(part.rank, count_writers())
        try:
            if writers.has_part:
                self._write_share(directory, part, writers)
        except Exception:
            with contextlib.suppress(RuntimeError):  # a peer is gone: keep the first error
                writers.compare(failed=True)
            raise
        writers.compare()

    def _write_share(self, directory: Path, part: Part, writers: ReplicaWriters) -> None:
        model = self._model.unwrap()
        optimizer = self._optimizer.unwrap() if self._optimizer is not None else None
        # Buffers of the replicas differ between two forward passes.
        buffers = {name for name, _ in model.named_buffers()}

        def takes(path: str, obj: Any, size: int) -> bool:
            own = isinstance(obj, Mapping) and not buffers.isdisjoint(obj)
            return writers.takes(path, size, shared=not own)

        with contextlib.ExitStack() as stack:
            if part.rank != 0:  # an index, which the booster writes as well, exists once
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(torch_save_through(directory, part, takes))
            self._save_state(GeneralCheckpointIO(), model, optimizer, directory)

    def _save_state(self, saver: Any, model: Any, optimizer: Any, directory: Path) -> None:
        saver.save_model(model, str(directory / "modeling"), shard=True)
        if optimizer is not None:
            saver.save_optimizer(optimizer, str(directory / "optimizer"), shard=True)


@contextlib.contextmanager
def plain_objects() -> Iterator[None]:
    """Keep ColossalAI from running code when it loads what use_async saved of an optimizer: pickles
    in tensors, which ``torch.load`` never sees."""
    plain, nested._unpickler = nested._unpickler, PlainUnpickler
    try:
        yield
    finally:
        nested._unpickler = plain
