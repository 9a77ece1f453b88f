"""Ways to save a training state: the floor, ours, and what comes with torch.

Each is called on both ranks at once. What ``save`` takes is the stall: when it returns, training
may go on and may change the tensors.
"""

from __future__ import annotations

import mmap
import os
import shutil
from abc import ABC, abstractmethod
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import Places
from safetensors.torch import save_file
from training_state import TrainingState

from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
from elastic_ckpt.checkpoint.memory.owned_tier import OwnedTier
from elastic_ckpt.checkpoint.memory.owner import tier_path
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.training.engines import Engine, EngineInputs, make_engine
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state.save import SaveOperation
from elastic_ckpt.training.state.snapshot import Snapshot
from elastic_ckpt.training.tensors.device_copy import pin, unpin

NODE = "benchmark"


class NotHere(Exception):
    """It does not run here; the text says why."""


class Saver(ABC):
    """One contestant on one rank.

    Attributes:
        name: of its row.
        how: what has happened to the bytes when ``save`` returns.
    """

    name: str
    how: str

    def __init__(self, rank: int, state: TrainingState, places: Places) -> None:
        self.rank = rank
        self.state = state
        self.places = places

    @abstractmethod
    def save(self, step: int) -> None:
        """What the training loop waits for. Every rank."""

    def settle(self) -> None:  # noqa: B027  # most have nothing in the background
        """Wait for what goes on behind it, and make the next save possible. Every rank."""

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Leave nothing behind."""


# -- the floor -----------------------------------------------------------------------------------


class Memcpy(Saver):
    """The same bytes into mapped pages that were written before; each rank copies its half."""

    name = "memcpy floor"
    how = "copied by both ranks, half each"
    ranks = 2

    def __init__(self, rank: int, state: TrainingState, places: Places) -> None:
        super().__init__(rank, state, places)
        loads = [0] * self.ranks
        self._mine: list[memoryview] = []
        for tensor in sorted(state.tensors(), key=lambda one: -one.nbytes):
            least = loads.index(min(loads))
            loads[least] += tensor.nbytes
            if least == rank:
                flat = tensor.detach().reshape(-1).view(torch.uint8).numpy()
                self._mine.append(memoryview(flat))
        size = max(1, sum(map(len, self._mine)))
        with open(places.memory / f"floor-{self.ranks}-{rank}", "w+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            self._mapping = mmap.mmap(
                file.fileno(), size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE
            )
        self._target = memoryview(self._mapping)

    def save(self, step: int) -> None:
        at = 0
        for source in self._mine:
            self._target[at : at + len(source)] = source
            at += len(source)


class MemcpyOnce(Memcpy):
    """All of it by one thread, as a state that one rank writes."""

    name = "memcpy by one thread"
    how = "copied by rank 0"
    ranks = 1


# -- ours ----------------------------------------------------------------------------------------


class Ours(Saver):
    """A save through the very function that a session calls, torch's engine."""

    name = "elastic-ckpt, disk"
    how = "hashed, synced and sealed on the disk"
    folder = "ours-disk"
    in_memory = False

    def __init__(self, rank: int, state: TrainingState, places: Places) -> None:
        super().__init__(rank, state, places)
        self.job = JobDirectory(places.disk / self.folder)
        self._tier: OwnedTier | None = None
        if rank == 0:
            self.job.root.mkdir()
            self.job.prepare()
            self.job.identity()  # made once, before the others read it
            if self.in_memory:
                self._tier = OwnedTier(places.memory, self.job, NODE)
        dist.barrier()
        self.memory = MemoryTier(tier_path(places.memory, self.job), Mappings(pin, unpin))
        self.engine = self.make_engine()
        self.runtime = _runtime(self.job, rank, self.memory if self.in_memory else None)

    def make_engine(self) -> Engine:
        """The engine under test."""
        state = self.state
        return make_engine(EngineInputs(None, state.model, state.optimizer, state.scheduler))

    def save(self, step: int) -> None:
        self.new_save(step).begin()

    def new_save(self, step: int) -> SaveOperation:
        """One that was not begun."""
        position = Position(step=step, step_in_epoch=step)
        snapshot = Snapshot("interval", position, {"epoch": 0, "step": step})
        return SaveOperation(self.runtime, self.engine, snapshot)

    def settle(self) -> None:
        """Nothing is drained: that is measured elsewhere."""
        if self.rank == 0:
            for one in self.sealed():
                one.generation.settle(one.seal)
            for path in self.job.root.glob("epoch-*"):
                shutil.rmtree(path)
        dist.barrier()

    def sealed(self) -> list[Sealed]:
        """What is in memory, newest first."""
        return self.memory.sealed() if self.in_memory else []

    def close(self) -> None:
        if self._tier is not None:
            self._tier.release(remove=True)
            self._tier = None


class OursMemory(Ours):
    """The same into the memory tier."""

    name = "elastic-ckpt, memory tier"
    how = "copied and sealed in memory"
    folder = "ours-memory"
    in_memory = True


@cache
def _peers() -> Peers:
    """One for all: two in one process would use the same keys of the ranks' store."""
    return Peers.connect()


def _runtime(job: JobDirectory, rank: int, memory: MemoryTier | None) -> Runtime:
    board = Board.private()
    slot = board.rank_slot(0)
    slot.launched(rank, os.getpid())
    return Runtime(
        job=job,
        name=NODE,
        journal=Journal(job, NODE),
        board=board,
        slot=slot,
        peers=_peers(),
        supervised=None,
        incarnation=1,
        fence=Fence(job),
        memory=memory,
    )


# -- what comes with torch -----------------------------------------------------------------------


class TorchSave(Saver):
    """One file from rank 0."""

    name = "torch.save"
    how = "in the page cache"
    synced = False

    def save(self, step: int) -> None:
        if self.rank == 0:
            path = self.places.disk / "torch-save.pt"
            with open(path, "wb") as file:
                torch.save(self.state.state_dict(), file)
                if self.synced:
                    file.flush()
                    os.fsync(file.fileno())

    def settle(self) -> None:
        if self.rank == 0:
            (self.places.disk / "torch-save.pt").unlink()


class TorchSaveSynced(TorchSave):
    """The same, durable."""

    name = "torch.save + fsync"
    how = "on the disk"
    synced = True


class Safetensors(Saver):
    """One file from rank 0; what is no tensor is left out."""

    name = "safetensors save_file"
    how = "in the page cache"
    synced = False

    def save(self, step: int) -> None:
        if self.rank == 0:
            path = self.places.disk / "state.safetensors"
            save_file(flat_tensors(self.state), path)
            if self.synced:
                sync_tree(path)

    def settle(self) -> None:
        if self.rank == 0:
            (self.places.disk / "state.safetensors").unlink()


class SafetensorsSynced(Safetensors):
    """The same, durable."""

    name = "safetensors save_file + fsync"
    how = "on the disk"
    synced = True


class DcpSync(Saver):
    """torch.distributed.checkpoint, as shipped: it syncs its files."""

    name = "DCP save"
    how = "on the disk, by both ranks"
    folder = "dcp"

    def save(self, step: int) -> None:
        dcp.save(self._state(), checkpoint_id=str(self.directory))

    def settle(self) -> None:
        dist.barrier()
        if self.rank == 0:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.directory)

    @property
    def directory(self) -> Path:
        """Where it saves."""
        return self.places.disk / self.folder

    def _state(self) -> dict[str, Any]:
        return self.state.state_dict()


class DcpAsync(DcpSync):
    """Its own copy of the tensors, made anew for each save, then a thread."""

    name = "DCP async, thread"
    how = "copied by each rank; a thread writes"
    folder = "dcp-async"

    def __init__(self, rank: int, state: TrainingState, places: Places) -> None:
        super().__init__(rank, state, places)
        self._pending: Future[Any] | None = None
        # What it agrees upon in the background must not meet the training's collectives.
        self._group = dist.new_group(backend="gloo")

    def save(self, step: int) -> None:
        self._pending = self.begin()

    def begin(self) -> Future[Any]:
        """Begin a save; done when its files are on the disk."""
        found: Any = dcp.async_save(
            self._state(), checkpoint_id=str(self.directory), process_group=self._group
        )
        return found

    def settle(self) -> None:
        if self._pending is not None:
            self._pending.result(timeout=300)
        self._pending = None
        super().settle()


class DcpAsyncReused(DcpAsync):
    """The copy goes into memory that is kept from save to save."""

    name = "DCP async, thread, stager kept"
    folder = "dcp-async-kept"

    def __init__(self, rank: int, state: TrainingState, places: Places) -> None:
        super().__init__(rank, state, places)
        self._writer = dcp.FileSystemWriter(self.directory, cache_staged_state_dict=True)

    def begin(self) -> Future[Any]:
        found: Any = dcp.async_save(
            self._state(),
            checkpoint_id=str(self.directory),
            storage_writer=self._writer,
            process_group=self._group,
        )
        return found


class DcpProcess(DcpAsync):
    """The copy is handed to a process of its own."""

    name = "DCP async, process"
    how = "copied by each rank; a process writes"
    folder = "dcp-process"

    def __init__(self, rank: int, state: TrainingState, places: Places) -> None:
        if not hasattr(dcp.state_dict_saver, "AsyncCheckpointerType"):
            raise NotHere(f"torch {torch.__version__} has no process-based save")
        super().__init__(rank, state, places)

    def begin(self) -> Future[Any]:
        kind = dcp.state_dict_saver.AsyncCheckpointerType.PROCESS
        found: Any = dcp.async_save(
            self._state(), checkpoint_id=str(self.directory), async_checkpointer_type=kind
        )
        return found


def flat_tensors(state: TrainingState) -> dict[str, torch.Tensor]:
    """All tensors by a name each, for a format that knows no trees."""
    named = {f"model.{name}": value for name, value in state.bare.state_dict().items()}
    for number, held in state.optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{number}.{name}": value for name, value in held.items()}
    return named


def sync_tree(path: Path) -> None:
    """Make a file, or all files below a directory, durable."""
    for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
