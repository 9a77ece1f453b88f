"""Replicas of other nodes' shares, so that a node which vanishes takes nothing with it.

::

    replicas/0002-3f9c.../        the share of the node whose first rank is 2
        state/  seal.json         as a generation's
        digests.json              of each piece, as it arrived

As in Gemini (Wang et al., SOSP 2023) a snapshot is sent to another node's memory between saves;
here each piece is hashed on arrival, and again before a load uses it.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.manifest import MAX_MANIFEST_BYTES, FileEntry, encode
from elastic_ckpt.checkpoint.memory.generation import SEAL_NAME, Generation, Sealed
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.memory.seal import MemorySeal, Share
from elastic_ckpt.checkpoint.nodes.client import PIECE_BYTES, NodeMemory
from elastic_ckpt.checkpoint.ownership.read_lock import removing
from elastic_ckpt.checkpoint.tier import TierFull
from elastic_ckpt.errors import CheckpointRejected, NodeLost
from elastic_ckpt.util.files import read_bounded, remove_tree, write_atomic
from elastic_ckpt.util.units import human_bytes

_DIGESTS: Final = "digests.json"
_making: set[Path] = set()
_making_lock = threading.Lock()

_KEPT: Final = 1
"""Older than the one that is made; the other nodes' memory has their part of it as well."""


def replicas(root: Path) -> list[Sealed]:
    """Return the complete replicas in a node's tier, newest first."""
    home = _home(root)
    names = os.listdir(home) if home.is_dir() and not home.is_symlink() else []
    found = [(one, one.seal()) for one in (Generation(home / name) for name in names)]
    sealed = [Sealed(one, seal) for one, seal in found if seal is not None]
    return sorted(sealed, key=lambda one: one.age, reverse=True)


def replicate(root: Path, source: Share, attempt: str, pause: Callable[[int], None]) -> Sealed:
    """Bring another node's share of an attempt here, and seal it; older ones of it are removed,
    but for the newest.

    Args:
        pause: called with each number of bytes that came; may wait, or raise to stop.

    Raises:
        NodeLost: that node does not answer.
        CheckpointRejected: it does not have the attempt.
        TierFull: there is no room in this node's memory.
        OSError: this node's memory failed.
    """
    place = _home(root) / f"{source.first:04d}-{attempt}"
    generation = Generation(place)
    if not attempt.isalnum():  # it names a directory
        raise CheckpointRejected(f"no attempt is called {attempt[:40]!r}")
    seal = generation.seal()
    if seal is not None:
        return Sealed(generation, seal)
    with _alone(place), NodeMemory(source) as node:
        seal = node.describe(attempt)
        seal = msgspec.structs.replace(seal, share=source, guards=())
        _make_room(root, source.first, seal.total_bytes)
        remove_tree(place)
        try:
            generation.path.mkdir(mode=0o700, parents=True)
            digests = {
                entry.path: _bring(node, attempt, entry, generation.path, pause)
                for entry in seal.files
            }
            write_atomic(place / _DIGESTS, msgspec.json.encode(digests))
            write_atomic(place / SEAL_NAME, encode(seal))
        except BaseException:
            remove_tree(place)
            raise
        with suppress(NodeLost, CheckpointRejected):  # its status says then that it is at risk
            node.report_copy(attempt)
    return Sealed(generation, seal)


def read_digests(sealed: Sealed) -> dict[str, list[str]]:
    """Return the digests of each file's pieces; CheckpointRejected without them."""
    try:
        data = read_bounded(sealed.generation.slot / _DIGESTS, MAX_MANIFEST_BYTES)
        return msgspec.json.decode(data, type=dict[str, list[str]])
    except FileNotFoundError:
        raise CheckpointRejected("a replica is damaged: it has no digests") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise CheckpointRejected(f"a replica's digests are damaged: {error}") from None


def check_piece(digests: dict[str, list[str]], path: str, begin: int, digest: str) -> None:
    """Raise CheckpointRejected unless a piece is what arrived."""
    number, rest = divmod(begin, PIECE_BYTES)
    known = digests.get(path, [])
    if rest or number >= len(known) or known[number] != digest:
        raise CheckpointRejected(f"the replica of {path[:80]} is damaged")


def drop_strangers(root: Path, guards: Iterable[Share], newest: MemorySeal) -> None:
    """Remove what is older than the newest checkpoint and of a share that this node keeps no more:
    the pairs were others. What a node that left has here stays until the disk has it, or newer."""
    kept = {one.first for one in guards}
    for one in replicas(root):
        is_stranger = one.seal.ranks.start not in kept and one.age < newest.age
        if is_stranger and not _is_owed(one):
            _remove(one.generation.slot)


def settle_replicas(root: Path, on_disk: Sealed) -> None:
    """Note that a checkpoint is on the disk: nothing as old is owed to it any more."""
    for one in replicas(root):
        if one.age <= on_disk.age:
            one.generation.settle(one.seal)


def _is_owed(one: Sealed) -> bool:
    """Return whether its node has left, and neither this nor anything newer is on the disk."""
    share = one.seal.share
    return share is not None and share.leaves and not one.settled


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Keep other threads of this process from making the same replica."""
    with _making_lock:
        if place in _making:
            raise CheckpointRejected("it is being copied already")
        _making.add(place)
    try:
        yield
    finally:
        with _making_lock:
            _making.discard(place)


def _bring(
    node: NodeMemory, attempt: str, entry: FileEntry, state: Path, pause: Callable[[int], None]
) -> list[str]:
    target = state / entry.path
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    buffer = bytearray(min(entry.bytes, PIECE_BYTES))
    digests: list[str] = []
    with open(os.open(target, flags, 0o600), "wb", buffering=0) as file:
        for begin in range(0, entry.bytes, PIECE_BYTES):
            piece = memoryview(buffer)[: min(PIECE_BYTES, entry.bytes - begin)]
            digests.append(node.fetch(attempt, entry.path, begin, piece))
            pause(len(piece))
            while piece:
                piece = piece[file.write(piece) :]
    return digests


def _make_room(root: Path, first: int, size: int) -> None:
    """Remove older replicas of a share, and those that were not finished."""
    complete = [one for one in replicas(root) if one.seal.ranks.start == first]
    kept = {one.generation.slot for one in complete[:_KEPT]}
    kept |= {one.generation.slot for one in complete if _is_owed(one)}
    for place in _home(root).glob(f"{first:04d}-*"):
        if place not in kept:
            _remove(place)
    room = room_bytes(root)
    if size > room:
        raise TierFull(
            0, f"a replica needs {human_bytes(size)}, and only {human_bytes(room)} are available"
        )


def _remove(place: Path) -> None:
    """Remove a replica, unless a load reads it."""
    with suppress(FileNotFoundError), removing(place, SEAL_NAME) as why:
        if why:
            return
        (place / SEAL_NAME).unlink()
    shutil.rmtree(place, ignore_errors=True)


def _home(root: Path) -> Path:
    return root / "replicas"
