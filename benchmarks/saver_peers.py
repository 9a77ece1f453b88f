"""Ways to save a training state that other projects offer; each is optional."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import MEMORY, Places
from savers import NotHere, Ours, Saver, sync_tree
from training_state import TrainingState

from elastic_ckpt.training.engines import Engine, EngineInputs, make_engine

_WAIT_SECONDS = 120.0


def _boosted(state: TrainingState) -> tuple[Any, ...]:
    """The state as ColossalAI's booster holds it, on the same tensors."""
    try:
        from colossalai.booster import Booster
        from colossalai.booster.plugin import TorchDDPPlugin
    except ImportError as error:
        raise NotHere(f"ColossalAI is not installed: {error}") from None
    from elastic_ckpt.training.engines.colossalai.cpu_shim import patch_loads

    patch_loads()
    booster = Booster(plugin=TorchDDPPlugin())
    model, optimizer, _, _, scheduler = booster.boost(
        state.bare, state.optimizer, lr_scheduler=state.scheduler
    )
    return booster, model, optimizer, scheduler


class ColossalAISave(Saver):
    """What its example's ``save_checkpoint`` does, in its order."""

    name = "ColossalAI save_checkpoint"
    how = "in the page cache, by rank 0"
    synced = False

    def __init__(self, rank: int, state: TrainingState, places: Places) -> None:
        super().__init__(rank, state, places)
        self._boosted = _boosted(state)
        self._directory = places.disk / f"colossalai-{self.synced}"

    def save(self, step: int) -> None:
        booster, model, optimizer, scheduler = self._boosted
        self._directory.mkdir(exist_ok=True)
        booster.save_model(model, str(self._directory / "modeling"), shard=True)
        booster.save_optimizer(optimizer, str(self._directory / "optimizer"), shard=True)
        booster.save_lr_scheduler(scheduler, str(self._directory / "lr_scheduler"))
        if self.rank == 0:
            (self._directory / "running_states.json").write_text(f'{{"epoch": 0, "step": {step}}}')
            if self.synced:
                sync_tree(self._directory)

    def settle(self) -> None:
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(self._directory)
        dist.barrier()


class ColossalAISaveSynced(ColossalAISave):
    """The same, durable."""

    name = "ColossalAI save_checkpoint + fsync"
    how = "on the disk, by rank 0"
    synced = True


class OursColossalAI(Ours):
    """Our save of the same booster into the memory tier."""

    name = "elastic-ckpt, memory tier, ColossalAI engine"
    how = "copied and sealed in memory"
    folder = "ours-colossalai"
    in_memory = True

    def make_engine(self) -> Engine:
        return make_engine(EngineInputs(*_boosted(self.state)))


class DLRoverFlash(Saver):
    """DLRover's flash checkpoint into shared memory; a process may write it to a disk later."""

    name = "DLRover flash checkpoint, memory"
    how = "copied by rank 0"

    def __init__(self, rank: int, state: TrainingState, places: Places) -> None:
        super().__init__(rank, state, places)
        # Names its sockets and its shared memory.
        os.environ["TORCHELASTIC_RUN_ID"] = self._run = places.memory.parent.name
        try:
            from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType
            from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer
        except ImportError as error:
            raise NotHere(f"not installed: {error}") from None
        finally:
            del os.environ["TORCHELASTIC_RUN_ID"]
        self._memory = StorageType.MEMORY
        os.environ["TORCHELASTIC_RUN_ID"] = self._run
        try:
            self._checkpointer = DdpCheckpointer(str(places.disk / "dlrover"))
        finally:
            del os.environ["TORCHELASTIC_RUN_ID"]

    def save(self, step: int) -> None:
        self._checkpointer.save_checkpoint(step, self.state.state_dict(), storage_type=self._memory)
        if self.rank == 0 and self._checkpointer._engine._cached_step != step:
            raise RuntimeError("it skipped the save")

    def close(self) -> None:
        engine = self._checkpointer._engine
        process = engine.saver_proc
        engine.close()
        if process is not None:
            process.kill()
            process.join(10)
        if self.rank == 0:
            for path in MEMORY.glob(f"*{self._run}_*"):
                path.unlink()
            shutil.rmtree(Path("/tmp/ckpt_sock") / self._run, ignore_errors=True)


class NvrxFork(Saver):
    """NVRx's asynchronous ``torch.save`` in a forked process, which copies when pages change."""

    name = "NVRx async torch.save, fork (CPU shim)"
    how = "nothing is copied: pages that change are, while a forked process writes"

    def __init__(self, rank: int, state: TrainingState, places: Places) -> None:
        super().__init__(rank, state, places)
        try:
            from nvidia_resiliency_ext.checkpointing.async_ckpt.torch_ckpt import (
                TorchAsyncCheckpoint,
            )
        except ImportError as error:
            raise NotHere(f"not installed: {error}") from None
        self._checkpoint = TorchAsyncCheckpoint(persistent_queue=False)
        self._path = places.disk / "nvrx.pt"

    def save(self, step: int) -> None:
        if self.rank == 0:
            with _no_device():
                self._checkpoint.async_save(self.state.state_dict(), str(self._path))

    def settle(self) -> None:
        if self.rank == 0:
            self._checkpoint.finalize_async_save(blocking=True, no_dist=True)
            limit = time.monotonic() + _WAIT_SECONDS
            while not self._path.exists() and time.monotonic() < limit:
                time.sleep(0.01)
            self._path.unlink()


class NvrxLocal(Saver):
    """NVRx's local checkpoint of each rank."""

    name = "NVRx local checkpoint"
    how = "written by each rank to memory"

    def __init__(self, rank: int, state: TrainingState, places: Places) -> None:
        super().__init__(rank, state, places)
        try:
            from nvidia_resiliency_ext.checkpointing.local.basic_state_dict import (
                BasicTensorAwareStateDict,
            )
            from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import (
                LocalCheckpointManager,
            )
        except ImportError as error:
            raise NotHere(f"not installed: {error}") from None
        self._wrap = BasicTensorAwareStateDict
        self._manager = LocalCheckpointManager(str(places.memory / "nvrx"))

    def save(self, step: int) -> None:
        try:
            wrapped = self._wrap(self.state.state_dict())
        except AssertionError:
            raise NotHere("it takes tensors of a CUDA device only") from None
        self._manager.save(wrapped, step, is_async=False)


@contextmanager
def _no_device() -> Iterator[None]:
    """Let NVRx wait for a device where there is none: it does so before it forks."""
    if torch.cuda.is_available():
        yield
        return
    cuda: Any = torch.cuda
    plain = cuda.synchronize
    cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        cuda.synchronize = plain
