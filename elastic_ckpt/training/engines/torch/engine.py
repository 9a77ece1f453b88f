"""Plain torch: a bare module, DistributedDataParallel, or ``fully_shard`` (FSDP2).

Each tensor is written once, by a rank that holds it, into safetensors files with an index. A load
reads what the rank needs, whatever the world size and the parallelism were. Rank 0 writes what has
no tensors with known names: a scheduler, an optimizer that is not torch's, any object with a
``state_dict``. Nothing is pickled.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from elastic_ckpt.checkpoint.manifest import CHUNK_BYTES, EngineInfo
from elastic_ckpt.checkpoint.tier import Part, Ranges
from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.engines import Engine, EngineInputs, tensor_bytes
from elastic_ckpt.training.engines.torch.planned_files import PlannedFile
from elastic_ckpt.training.engines.torch.restore import (
    Restoration,
    restore_module,
    restore_optimizer,
)
from elastic_ckpt.training.engines.torch.save_plan import PlanCache
from elastic_ckpt.training.engines.torch.state import (
    PartState,
    bare,
    has_named_tensors,
    local_part,
    module_state,
    optimizer_state,
)
from elastic_ckpt.training.tensors.device_copy import DeviceCopies, is_on_device
from elastic_ckpt.training.tensors.safetensors_file import first_tensor_at, write_file
from elastic_ckpt.training.tensors.shard_index import INDEX_NAME, ShardIndex
from elastic_ckpt.training.tensors.shard_reader import ShardReader
from elastic_ckpt.training.tensors.state_codec import (
    MAX_JSON_BYTES,
    dump_tree,
    read_state,
    rejecting,
    write_state,
)
from elastic_ckpt.util.files import read_bounded

_MODEL: Final = "modeling"
_OPTIMIZER: Final = "optimizer"

_STEADY_BYTES: Final = 64 * 1024
"""Copying less than this on the device costs almost nothing."""

_plans: WeakKeyDictionary[Any, PlanCache] = WeakKeyDictionary()
"""By model, as ``save_checkpoint`` constructs an engine at every call."""


class TorchEngine(Engine):
    """Saves ``model``, ``optimizer`` and ``lr_scheduler``; the last two may be None.

    Raises:
        UsageError: a part of the model is wrapped by ``FullyShardedDataParallel``.
    """

    def __init__(self, model: Any, optimizer: Any, lr_scheduler: Any) -> None:
        self._model = model
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._named = has_named_tensors(model)
        if self._named:
            _refuse_flat_parameters(model)
        self._plans = _plans.setdefault(model, PlanCache()) if self._named else PlanCache()
        self.info = EngineInfo(
            name="torch",
            version=str(torch.__version__),
            plugin=_parallelism(model),
            precision=_precision(model),
        )

    @classmethod
    def from_inputs(cls, inputs: EngineInputs) -> TorchEngine:
        """Construct the engine as ``make_engine`` does."""
        return cls(inputs.model, inputs.optimizer, inputs.lr_scheduler)

    @property
    def by_path(self) -> bool:
        """False: all files go through the part. True if a subclass may save in its own way."""
        return type(self) is not TorchEngine

    @property
    def reads_peers_files(self) -> bool:
        """False: no file is read. True if a subclass may save in its own way."""
        return type(self) is not TorchEngine

    @property
    def overlaps(self) -> bool:
        """Whether the parameters are on a device."""
        return self._named and any(is_on_device(one) for one in self._model.parameters())

    def save(self, directory: Path, part: Part, copies: DeviceCopies | None = None) -> None:
        """Write this rank's tensors; rank 0 also writes the indexes and everything else."""
        states: dict[str, PartState] | Exception
        try:
            states = self._states()
        except Exception as error:  # the plan reports it, so that the other ranks do not wait
            states = error
        plan = self._plans.plan_for(states)
        if isinstance(states, Exception):
            raise states
        for file in plan.files:
            _write(part, file, states[file.part], copies)
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        for path, index in plan.indexes.items():
            part.write(path, index)
        for name, state in states.items():
            part.write(f"{name}/state.json", dump_tree(state.tree, name))
        for name, thing in self._things():
            if name not in states:
                write_state(part, f"{name}/state", bare(thing).state_dict())

    def load(self, directory: Path) -> str:
        """Read what this rank needs; CheckpointError if the state does not fit. Not collective."""
        with ExitStack() as held:
            halves = self._halves(directory, held)
            for name, thing in self._things():
                if name not in halves:
                    bare(thing).load_state_dict(read_state(directory / name, "state"))
            for reader, half in halves.values():
                reader.check(half.wanted)  # of all, before the first is read
            for reader, half in halves.values():
                reader.read(half.wanted)
            for _, half in halves.values():
                half.finish()
        return ""

    def ranges(self, directory: Path) -> Ranges | None:
        """Name the bytes of this rank's shards; raises as :meth:`load`. None if the header of a
        file is not there in full."""
        files = [*directory.glob("*/*.safetensors")]
        if any(first_tensor_at(file) > CHUNK_BYTES for file in files):
            return None
        with ExitStack() as held:
            return {
                f"{name}/{file}": ranges
                for name, (reader, half) in self._halves(directory, held).items()
                for file, ranges in reader.ranges(half.wanted).items()
            }

    def _halves(
        self, directory: Path, held: ExitStack
    ) -> dict[str, tuple[ShardReader, Restoration]]:
        """Return the parts with an index, open until ``held`` ends, and how to restore them."""
        found = {}
        for name, _ in self._things():
            if (directory / name / INDEX_NAME).exists():
                reader = held.enter_context(ShardReader(directory / name))
                found[name] = reader, self._restoration(directory / name, reader.index)
        return found

    def state_bytes(self) -> int:
        """Count the tensors of all ranks; a shard counts as the whole tensor."""
        if not self._named:
            return sum(tensor_bytes(thing.state_dict()) for _, thing in self._things())
        total = tensor_bytes([*self._model.parameters(), *self._model.buffers()])
        for name, thing in self._things():
            if isinstance(thing, torch.optim.Optimizer):
                total += tensor_bytes(list(thing.state.values()))
            elif name != _MODEL:
                total += tensor_bytes(thing.state_dict())
        return total

    def _states(self) -> dict[str, PartState]:
        """Return the parts whose tensors have known names."""
        states = {}
        if self._named:
            states[_MODEL] = module_state(self._model)
            found = optimizer_state(self._model, self._optimizer)
            if found is not None:
                states[_OPTIMIZER] = found
        return states

    def _restoration(self, directory: Path, index: ShardIndex) -> Restoration:
        if not self._named:
            raise UsageError(
                "the checkpoint is of a torch module: pass one, or start over with a new --dir"
            )
        with rejecting(f"state in {directory.name}"):
            tree = json.loads(read_bounded(directory / "state.json", MAX_JSON_BYTES))
            if directory.name == _MODEL:
                return restore_module(self._model, tree, index)
            return restore_optimizer(self._model, self._optimizer, tree, index)

    def _things(self) -> list[tuple[str, Any]]:
        things = {
            _MODEL: self._model,
            _OPTIMIZER: self._optimizer,
            "lr_scheduler": self._lr_scheduler,
        }
        return [(name, thing) for name, thing in things.items() if thing is not None]


def _write(part: Part, file: PlannedFile, state: PartState, copies: DeviceCopies | None) -> None:
    tensors = {inside: local_part(state.tensors[name]) for inside, name in file.names.items()}
    if copies is not None:
        for inside, name in file.names.items():
            if is_on_device(tensors[inside]) and not _is_steady(file.part, state.tensors[name]):
                tensors[inside] = tensors[inside].clone()
    with part.open(file.path, file.header.file_bytes) as sink:
        write_file(sink, file.header, tensors, copies)


def _is_steady(part: str, tensor: torch.Tensor) -> bool:
    """Return whether only the optimizer's step modifies a tensor; a forward pass modifies buffers,
    a scheduler perhaps a learning rate, which is small."""
    return tensor.nbytes >= _STEADY_BYTES and (
        part == _OPTIMIZER or isinstance(tensor, nn.Parameter)
    )


def _refuse_flat_parameters(model: nn.Module) -> None:
    old = sys.modules.get("torch.distributed.fsdp")  # not imported here: that takes a second
    if old is not None and any(
        isinstance(m, old.FullyShardedDataParallel) for m in model.modules()
    ):
        raise UsageError(
            "FullyShardedDataParallel flattens parameters, which then have no names of their own: "
            "use torch.distributed.fsdp.fully_shard"
        )


def _parallelism(model: Any) -> str:
    if not isinstance(model, nn.Module):
        return "object"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "dtensor"
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    return "ddp" if wrapped else "module"


def _precision(model: Any) -> str:
    if not isinstance(model, nn.Module):
        return ""
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return "+".join(sorted(kinds))
