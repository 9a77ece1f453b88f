"""A disk that loses power: which trees can a recorded save leave?

The model is meaner than a journaling file system and no meaner than POSIX:

* What was written to a file may be lost, in part or in whole and in any order, until the file is
  fsynced; the size may be there without the data, which then reads as zeros.
* A name that was made, removed or moved may be lost or kept, each on its own and in any order,
  until the directory that it stands in is fsynced. Syncing a file does not keep its name.
* A rename is atomic: the old name or the new one, never both and never neither. It is durable
  once the directory that it leads to is fsynced. Every journaling file system keeps this
  promise, and no checkpoint store can do without it.
* What is fsynced stays, and modes are taken to be there at once.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from tests.faults.syscalls import FAMILIES, UNKNOWN_TO_US, Call

Tree = dict[str, bytes | None]
"""Relative path to contents; None for a directory."""

ROOT = 0
"""The job directory's inode."""


@dataclass(frozen=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Resize:
    inode: int
    size: int


@dataclass(frozen=True)
class Link:
    """A name for an inode, new or not."""

    directory: int
    name: str
    inode: int


@dataclass(frozen=True)
class Unlink:
    directory: int
    name: str


@dataclass(frozen=True)
class Move:
    source: int
    old: str
    directory: int
    name: str
    inode: int


@dataclass(frozen=True)
class Sync:
    """An fsync; ``inode`` is None for a sync of everything."""

    inode: int | None
    path: str
    of_directory: bool


Change = Write | Resize | Link | Unlink | Move


class Fate(Enum):
    """What became of a change that nothing had made durable; the last two are for writes."""

    LOST = "lost"
    KEPT = "kept"
    TORN = "torn"
    ZEROS = "zeros"


Fates = dict[int, Fate]
"""By the change's place in the log; what is not in it is kept."""


class NotModelled(Exception):
    """The save did something that this disk does not know."""


@dataclass
class Recording:
    """A tree and what was done to it, in order."""

    entries: dict[int, dict[str, int]] = field(default_factory=dict)
    data: dict[int, bytes] = field(default_factory=dict)
    log: list[Change | Sync] = field(default_factory=list)

    def without(self, unwanted: Callable[[Sync], bool]) -> Recording:
        """Return the same save without some of its syncs."""
        log = [step for step in self.log if not (isinstance(step, Sync) and unwanted(step))]
        return replace(self, log=log)

    def pending(self, end: int) -> list[int]:
        """Return the log positions of changes before ``end`` that no sync has made durable."""
        pending: list[int] = []
        for place, step in enumerate(self.log[:end]):
            if isinstance(step, Sync):
                pending = [at for at in pending if not _keeps(step, self.log[at])]
            else:
                pending.append(place)
        return pending

    def tree(self, end: int, fates: Fates) -> Tree:
        """Return the tree on disk after a power cut before step ``end``."""
        entries = {inode: dict(names) for inode, names in self.entries.items()}
        data = {inode: bytearray(content) for inode, content in self.data.items()}
        for place, step in enumerate(self.log[:end]):
            fate = fates.get(place, Fate.KEPT)
            if not isinstance(step, Sync) and fate is not Fate.LOST:
                _apply(step, fate, entries, data)
        return dict(_walk(ROOT, "", entries, data))


def _keeps(sync: Sync, change: Change | Sync) -> bool:
    if sync.inode is None:
        return True
    if isinstance(change, Write | Resize):
        return change.inode == sync.inode
    return not isinstance(change, Sync) and change.directory == sync.inode


def _apply(
    change: Change, fate: Fate, entries: dict[int, dict[str, int]], data: dict[int, bytearray]
) -> None:
    match change:
        case Write(inode, offset, written):
            content = data[inode]
            if fate is Fate.TORN:
                written = written[: len(written) // 2]
            elif fate is Fate.ZEROS:
                written = bytes(len(written))
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(written)] = written
        case Resize(inode, size):
            content = data[inode]
            del content[size:]
            content.extend(bytes(size - len(content)))
        case Link(directory, name, inode):
            entries[directory][name] = inode
        case Unlink(directory, name):
            entries[directory].pop(name, None)
        case Move(source, old, directory, name, inode):
            if entries[source].get(old) == inode:
                del entries[source][old]
            entries[directory][name] = inode


def _walk(
    inode: int, path: str, entries: dict[int, dict[str, int]], data: dict[int, bytearray]
) -> Iterator[tuple[str, bytes | None]]:
    for name, below in sorted(entries[inode].items()):
        place = f"{path}{name}"
        if below in entries:
            yield place, None
            yield from _walk(below, f"{place}/", entries, data)
        else:
            yield place, bytes(data[below])


# -- which trees are tried ---------------------------------------------------------------------


def states(recording: Recording, end: int, dice: random.Random, drawn: int = 40) -> Iterator[Fates]:
    """Yield the states that a power cut before step ``end`` can leave.

    Everything unsynced kept, all lost, each change alone lost, each alone kept, each write torn
    or zeros among what is kept, and ``drawn`` random mixtures.
    """
    pending = recording.pending(end)
    writes = [place for place in pending if isinstance(recording.log[place], Write)]
    nothing = dict.fromkeys(pending, Fate.LOST)
    yield {}
    yield nothing
    for place in pending:
        yield {place: Fate.LOST}
        yield {**nothing, place: Fate.KEPT}
    for place in writes:
        yield {place: Fate.TORN}
        yield {place: Fate.ZEROS}
    for _ in range(drawn if pending else 0):
        lost = dice.random()
        fates = {place: Fate.LOST for place in pending if dice.random() < lost}
        for place in writes:
            if place not in fates:
                fates[place] = dice.choice((Fate.KEPT, Fate.KEPT, Fate.TORN, Fate.ZEROS))
        yield fates


def put_on_disk(tree: Tree, root: Path) -> None:
    """Write a tree to disk; ``root`` must not exist."""
    root.mkdir()
    for name, content in tree.items():  # parents come before what is in them
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


def read_from_disk(root: Path) -> Tree:
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
    }


# -- recording ---------------------------------------------------------------------------------


@dataclass
class _Open:
    """What a descriptor stands for."""

    inode: int
    offset: int = 0
    append: bool = False


def record(root: Path, before: Tree, calls: Sequence[Call]) -> Recording:
    """Turn a traced save into its changes of a fully synced tree, ``before``.

    Raises:
        NotModelled: a call changes the directory in a way that the model does not know.
    """
    recorder = _Recorder(root, before)
    for call in calls:
        if not call.error and call.result is not None:
            recorder.take(call)
    return recorder.recording


class _Recorder:
    def __init__(self, root: Path, before: Tree) -> None:
        self._root = str(root)
        self._entries: dict[int, dict[str, int]] = {ROOT: {}}
        self._size: dict[int, int] = {}
        self._open: dict[int, _Open] = {}
        self._inodes = 1
        self.recording = Recording()
        for name in sorted(before):  # parents first
            directory, last = self._place(name)
            content = before[name]
            inode = self._new(directory=content is None)
            self._entries[directory][last] = inode
            if content is not None:
                self._size[inode] = len(content)
                self.recording.data[inode] = content
        self.recording.entries |= {at: dict(names) for at, names in self._entries.items()}

    def take(self, call: Call) -> None:
        """Record one successful call."""
        inside = [self._relative(path) for path in call.paths]
        if call.name in FAMILIES["open"]:
            self._take_open(call, inside[0])
        elif call.name in ("sync", "syncfs"):
            self.recording.log.append(Sync(None, "", of_directory=True))
        elif not any(path is not None for path in inside):
            return
        elif None in inside:
            raise NotModelled(f"it leads into the directory or out of it: {call}")
        else:
            self._take_inside(call, [path for path in inside if path is not None])

    def _take_inside(self, call: Call, paths: list[str]) -> None:
        name, log = call.name, self.recording.log
        if name in FAMILIES["write"] or name in ("lseek", "ftruncate"):
            self._take_on_descriptor(call, paths[0])
        elif name in FAMILIES["sync"]:
            inode = self._of_descriptor(call, paths[0]).inode
            log.append(Sync(inode, paths[0], inode in self._entries))
        elif name in FAMILIES["mkdir"]:
            self._link(paths[0], self._new(directory=True))
        elif name in FAMILIES["link"]:
            self._link(paths[1], self._find(paths[0]))
        elif name in FAMILIES["unlink"]:
            directory, last = self._place(paths[0])
            del self._entries[directory][last]
            log.append(Unlink(directory, last))
        elif name in FAMILIES["rename"]:
            self._take_rename(call, *paths)
        elif name not in FAMILIES["mode"] or name in UNKNOWN_TO_US:
            raise NotModelled(str(call))

    def _take_open(self, call: Call, path: str | None) -> None:
        assert call.result is not None
        self._open.pop(call.result, None)  # the descriptor's number may have been used before
        if path is None:
            return
        if "O_TMPFILE" in call.rest:
            raise NotModelled(str(call))
        inode = self._find(path, missing_ok=True)
        if inode is None:
            inode = self._new(directory=False)
            self._link(path, inode)
        elif "O_TRUNC" in call.rest or call.name == "creat":
            self._resize(inode, 0)
        self._open[call.result] = _Open(inode, append="O_APPEND" in call.rest)

    def _take_on_descriptor(self, call: Call, path: str) -> None:
        assert call.result is not None
        open_file = self._of_descriptor(call, path)
        inode = open_file.inode
        if call.name == "lseek":
            open_file.offset = call.result
        elif call.name == "ftruncate":
            self._resize(inode, int(call.rest.rsplit(",", 1)[1]))
        else:
            offset = self._size[inode] if open_file.append else open_file.offset
            if call.name == "pwrite64":
                offset = int(call.rest.rsplit(",", 1)[1])
            else:
                open_file.offset = offset + call.result
            self._size[inode] = max(self._size[inode], offset + call.result)
            self.recording.log.append(Write(inode, offset, call.data[: call.result]))

    def _take_rename(self, call: Call, old: str, new: str) -> None:
        if "RENAME_EXCHANGE" in call.rest or "RENAME_WHITEOUT" in call.rest:
            raise NotModelled(str(call))
        (source, old_name), (directory, name) = self._place(old), self._place(new)
        inode = self._entries[source].pop(old_name)
        self._entries[directory][name] = inode
        self.recording.log.append(Move(source, old_name, directory, name, inode))

    def _link(self, path: str, inode: int) -> None:
        directory, name = self._place(path)
        self._entries[directory][name] = inode
        self.recording.log.append(Link(directory, name, inode))

    def _resize(self, inode: int, size: int) -> None:
        self._size[inode] = size
        self.recording.log.append(Resize(inode, size))

    def _of_descriptor(self, call: Call, path: str) -> _Open:
        """Return what a descriptor refers to, which must match strace's output."""
        number = int(call.rest.split(",", 1)[0])
        found = self._open.get(number)
        if found is None or self._find(path, missing_ok=True) != found.inode:
            raise NotModelled(f"the descriptor {number} was not opened as {path}: {call}")
        return found

    def _new(self, *, directory: bool) -> int:
        inode = self._inodes
        self._inodes += 1
        if directory:
            self._entries[inode] = {}
            self.recording.entries[inode] = {}
        else:
            self._size[inode] = 0
            self.recording.data[inode] = b""
        return inode

    def _relative(self, path: str) -> str | None:
        if path != self._root and not path.startswith(f"{self._root}/"):
            return None
        return os.path.normpath(os.path.relpath(path, self._root))

    def _place(self, path: str) -> tuple[int, str]:
        parent, _, name = path.rpartition("/")
        directory = self._find(parent or ".")
        assert directory is not None
        return directory, name

    def _find(self, path: str, *, missing_ok: bool = False) -> int | None:
        inode: int = ROOT
        for name in path.split("/") if path != "." else ():
            below = self._entries[inode].get(name)
            if below is None:
                if missing_ok:
                    return None
                raise NotModelled(f"{path} is not there")
            inode = below
        return inode


def places(recording: Recording) -> Iterable[int]:
    """Return every moment: before each step, and after the last."""
    return range(len(recording.log) + 1)
