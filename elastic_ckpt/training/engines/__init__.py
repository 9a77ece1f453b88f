"""Engines write and read the state of model, optimizer and scheduler.

:class:`Engine` is the contract, ``CONTRIBUTING.md`` has an example that a test runs. A package
adds an engine with an entry point in the group ``elastic_ckpt.engines``, and a script selects it
by name: ``Session(engine="NAME")``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from elastic_ckpt.checkpoint.manifest import EngineInfo
from elastic_ckpt.checkpoint.tier import Part, Ranges
from elastic_ckpt.training.tensors.device_copy import DeviceCopies
from elastic_ckpt.util.plugins import load_plugin

GROUP: Final = "elastic_ckpt.engines"

BUILT_IN: Final[Mapping[str, str]] = {
    "torch": "elastic_ckpt.training.engines.torch.engine:TorchEngine.from_inputs",
    "colossalai": "elastic_ckpt.training.engines.colossalai.engine:ColossalAIEngine",
}


@dataclass(frozen=True)
class EngineInputs:
    """What a script trains; all but the model may be None.

    Attributes:
        booster: a ColossalAI ``Booster``.
        use_async: whether the script wants asynchronous writes; an engine may ignore it.
    """

    booster: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    use_async: bool = False


class Engine(Protocol):
    """Saves and loads the state of a script's model, optimizer and scheduler.

    An engine has nine members. A class that derives from this one defines four of them: ``info``,
    ``save``, ``load`` and ``state_bytes``. It is constructed with :class:`EngineInputs`, on every
    rank: once by a ``Session``, at each call by ``save_checkpoint`` and ``load_checkpoint``.

    An exception on one rank fails the save or load on all of them, with the same typed error. An
    ``OSError`` counts as the storage's, so the job may continue without this save.

    Attributes:
        info: recorded in each manifest. A checkpoint is loaded only by an engine with the ``name``
            that wrote it.
    """

    info: EngineInfo

    def save(self, directory: Path, part: Part, copies: DeviceCopies | None = None) -> None:
        """Write the state. Every rank calls it at the same step, so it may be collective.

        Create files through ``part.open`` or ``part.write``, which hash them on the way and make
        them durable. Files that a library creates below ``directory`` itself are found and hashed
        afterwards. Do not fsync or rename, and do not write a path that another rank writes.

        Args:
            directory: exists, and holds nothing of an earlier save.
            part: this rank's files; ``part.rank`` is its rank.
            copies: None unless ``overlaps`` is true. It accepts tensors that only the optimizer's
                step modifies and copies them while training continues. Any other state may change
                as soon as this returns.
        """

    def load(self, directory: Path) -> str:
        """Restore the state. Every rank calls it, so it may be collective.

        Every byte below ``directory`` matches its manifest, which does not make the files
        trustworthy: never unpickle code.

        Returns:
            What could not be restored bit for bit, and why; empty if everything was.
        """
        ...

    def ranges(self, directory: Path) -> Ranges | None:
        """Return which bytes of which files ``load`` will read on this rank. Not collective.

        Every rank calls it before ``load`` if the checkpoint is in a bucket. Of the files that it
        names only these bytes are fetched, so ``load`` must not read any others. By default all
        files are fetched in full.

        Args:
            directory: as for ``load``, except that files of more than 16 MiB (``CHUNK_BYTES``) have
                only their first 16 MiB and then a hole, unless their name ends with ``.json``.

        Returns:
            For each path below ``directory`` a list of (begin, end) in bytes. Files that are not
            listed are fetched in full; None means all files.
        """
        return None

    def state_bytes(self) -> int:
        """Return about how many bytes a save of all ranks writes. Not collective.

        Rank 0 calls it before each save, to see whether the memory tier or the disk has room; on
        several nodes one rank of each does.
        """
        ...

    def check(self, directory: Path, rank: int) -> None:
        """Check that the save is complete, after ``save`` returned on all ranks. Not collective.

        Every rank calls it. By default it accepts everything.

        Raises:
            SaveFailed: something is missing; the checkpoint is not sealed.
        """
        return

    @property
    def by_path(self) -> bool:
        """Whether ``save`` may create files otherwise than through ``part``, which then have to be
        searched for. It must be the same on every rank; True by default."""
        return True

    @property
    def reads_peers_files(self) -> bool:
        """Whether ``save`` or ``check`` on a rank reads files that other ranks wrote. If not, saves
        of several nodes go into their memory: below ``directory`` each node has its ranks' files
        alone. It must be the same on every rank; True by default."""
        return True

    @property
    def overlaps(self) -> bool:
        """Whether ``save`` uses ``copies``. It must be the same on every rank; False by default."""
        return False


def tensor_bytes(tree: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        return sum(tensor_bytes(value) for value in tree.values())
    if isinstance(tree, list | tuple):
        return sum(tensor_bytes(value) for value in tree)
    return getattr(tree, "nbytes", 0) if hasattr(tree, "element_size") else 0


def make_engine(inputs: EngineInputs, name: str | None = None) -> Engine:
    """Construct the engine that is registered under ``name``.

    Args:
        name: None selects ``colossalai`` if there is a booster, otherwise ``torch``.

    Raises:
        UsageError: no engine has that name, or its package cannot be imported.
    """
    if name is None:
        name = "torch" if inputs.booster is None else "colossalai"
    engine: Engine = load_plugin("engine", name, GROUP, BUILT_IN)(inputs)
    return engine
