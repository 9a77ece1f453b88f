"""A session's saves, one after the other; the last may still be under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elastic_ckpt.checkpoint.nodes.tier import NodesMemory
from elastic_ckpt.errors import StateModified, StorageFailed
from elastic_ckpt.protocol.slot import Source
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state.candidate import Loaded
from elastic_ckpt.training.state.save import SaveOperation
from elastic_ckpt.training.state.snapshot import Snapshot


class Saver:
    """Makes a session's saves. ``save`` and ``complete`` are collective. A storage error ends the
    job only in an emergency save or the final one.

    Attributes:
        last: (epoch, step) of the newest checkpoint.
        is_shared: whether that is in the memory of several nodes, each of which has a share.
    """

    def __init__(self, runtime: Runtime, engine: Engine, optimizer: Any) -> None:
        self._runtime = runtime
        self._engine = engine
        self._under_way: SaveOperation | None = None
        self.last = (-1, -1)
        self.is_shared = False
        self._parent = ""  # of the newest
        # The next step's passes only read what is saved; its optimizer modifies it.
        inner = getattr(optimizer, "optim", optimizer)
        self._may_overlap = hasattr(inner, "register_step_pre_hook")
        self._hook: Any = None
        if self._may_overlap:
            self._hook = inner.register_step_pre_hook(self._before_optimizer_step)

    def resume(self, loaded: Loaded) -> None:
        """Continue from a checkpoint."""
        seal, is_in_memory = loaded.seal, loaded.source is Source.MEMORY
        self._note_newest((seal.epoch, seal.step), seal.parent, is_in_memory=is_in_memory)

    def detach(self) -> None:
        """Take the hook off the optimizer; a save that was not completed is never sealed."""
        if self._hook is not None:
            self._hook.remove()

    def save(self, snapshot: Snapshot) -> None:
        """Save; a device may continue to copy until :meth:`complete`."""
        self.complete()
        if (snapshot.position.epoch, snapshot.position.step) == self.last:
            self._runtime.parent = self._parent  # as of the same checkpoint in another tier
        save = SaveOperation(self._runtime, self._engine, snapshot)
        with self._continuing(save):
            save.begin(overlap=snapshot.reason == "interval" and self._may_overlap)
            if save.under_way:
                self._under_way = save
            else:
                self._note(save)

    def complete(self) -> bool:
        """Seal a save that is under way; return False if it has to be repeated without overlap."""
        save, self._under_way = self._under_way, None
        if save is None:
            return True
        try:
            with self._continuing(save):
                save.complete()
                self._note(save)
        except StateModified as error:
            self._may_overlap = False
            self._runtime.leader_says(
                f"save failed, and training waits for saves from now on: {error}"
            )
            return False
        return True

    def _before_optimizer_step(self, *_: Any) -> None:
        if self._under_way is not None:
            self._under_way.guard()

    def _note(self, save: SaveOperation) -> None:
        key = (save.position.epoch, save.position.step)
        self._note_newest(key, save.parent, is_in_memory=save.is_in_memory)

    def _note_newest(self, key: tuple[int, int], parent: str, *, is_in_memory: bool) -> None:
        self.last, self._parent = key, parent
        self.is_shared = is_in_memory and isinstance(self._runtime.memory, NodesMemory)

    @contextmanager
    def _continuing(self, save: SaveOperation) -> Iterator[None]:
        try:
            yield
        except StorageFailed as error:
            if save.reason in ("emergency", "final"):
                raise
            self._runtime.leader_says(
                f"the save at step {save.position.step} failed, training continues: {error}"
            )
