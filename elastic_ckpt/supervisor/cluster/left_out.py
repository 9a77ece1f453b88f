"""The nodes that the job leaves out, as its head keeps them: noted where the next head finds them,
and where a command that lets one in removes the note."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from elastic_ckpt.checkpoint.bucket.keys import LEFT_OUT
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.jobdir.left_out import (
    MAX_NOTE_BYTES,
    LeftOutNode,
    decode_note,
    encode_note,
    names_left_out,
    read_left_out,
    remove_left_out,
    write_left_out,
)
from elastic_ckpt.jobdir.paths import JobDirectory


class Notes(Protocol):
    """Where the notes are. One thread calls the methods; OSError if the storage does not answer."""

    @property
    def look_seconds(self) -> float:
        """How often to look for notes that were removed."""

    def names(self) -> set[str]:
        """Return the names of all nodes that are noted."""

    def read(self) -> list[LeftOutNode]:
        """Return the notes."""

    def write(self, node: LeftOutNode) -> None:
        """Note a node, in place of an earlier note."""

    def remove(self, name: str) -> None:
        """Remove a note, if it is there."""


class DirectoryNotes:
    """In the job directory."""

    look_seconds: Final = 1.0

    def __init__(self, job: JobDirectory) -> None:
        self._job = job

    def names(self) -> set[str]:
        return names_left_out(self._job)

    def read(self) -> list[LeftOutNode]:
        return read_left_out(self._job)

    def write(self, node: LeftOutNode) -> None:
        write_left_out(self._job, node)

    def remove(self, name: str) -> None:
        remove_left_out(self._job, name)


class BucketNotes:
    """In the bucket of several nodes; the head's own directory has copies, for ``status`` there. A
    node is let in as soon as either is gone."""

    look_seconds: Final = 10.0

    def __init__(self, job: JobDirectory, store: Bucket) -> None:
        self._store = store
        self._copies = DirectoryNotes(job)

    def names(self) -> set[str]:
        return _names_in(self._store) & self._copies.names()

    def read(self) -> list[LeftOutNode]:
        notes = notes_in(self._store)
        for name in self._copies.names() - {one.node for one in notes}:
            self._copies.remove(name)
        for one in notes:
            self._copies.write(one)
        return notes

    def write(self, node: LeftOutNode) -> None:
        self._store.put(_key(node.node), encode_note(node))
        self._copies.write(node)

    def remove(self, name: str) -> None:
        remove_in(self._store, name)
        self._copies.remove(name)


def notes_in(store: Bucket) -> list[LeftOutNode]:
    """Return the notes of a bucket, by name."""
    names = sorted(_names_in(store))
    found = (decode_note(store.get(_key(one), MAX_NOTE_BYTES)) for one in names)
    return [one for one in found if one is not None]


def remove_in(store: Bucket, name: str) -> None:
    """Remove a note from a bucket."""
    store.delete([_key(name)])


def _names_in(store: Bucket) -> set[str]:
    keys = [one.key for page in store.listing(LEFT_OUT) for one in page]
    return {key.removeprefix(LEFT_OUT).removesuffix(".json") for key in keys}


def _key(name: str) -> str:
    return f"{LEFT_OUT}{name}.json"


class LeftOutNodes:
    """The loop's view of the notes. Only :meth:`_read`, :meth:`_look` and what writes run in the
    thread that does the job directory's work, in the order in which they were given to it.

    Attributes:
        nodes: by name.
        is_read: whether the notes of earlier heads have been read, or could not be.
    """

    def __init__(
        self, notes: Notes | None = None, later: Callable[[Callable[[], None]], None] | None = None
    ) -> None:
        """``later`` has that thread do something. Without ``notes`` they end with this head."""
        self.nodes: dict[str, LeftOutNode] = {}
        self.is_read = notes is None
        self._notes = notes
        self._later = later
        self._earlier: deque[LeftOutNode] = deque()
        self._noted: set[str] = set()
        self._removed: deque[str] = deque()
        self._is_looking = False
        self._look_at = 0.0
        if notes is not None and later is not None:
            later(partial(self._read, notes))

    def add(self, node: LeftOutNode) -> None:
        """Leave a node out."""
        self.nodes[node.node] = node
        if self._notes is not None and self._later is not None:
            self._later(partial(self._write, self._notes, node))

    def remove(self, name: str) -> None:
        """Let a node in."""
        del self.nodes[name]
        if self._notes is not None and self._later is not None:
            self._later(partial(self._remove, self._notes, name))

    def take_removed(self, now: float) -> list[LeftOutNode]:
        """Return the nodes that a command has let in since the last call; look for more if any is
        left out, and it is time."""
        while self._earlier:
            one = self._earlier.popleft()
            self.nodes.setdefault(one.node, one)
        found = [self._removed.popleft() for _ in range(len(self._removed))]
        let_in = [self.nodes[name] for name in found if name in self.nodes]
        for one in let_in:
            self.remove(one.node)  # a bucket's copy, or that of a copy
        if self.nodes and not self._is_looking and now >= self._look_at:
            self._look_soon(now)
        return let_in

    def _look_soon(self, now: float) -> None:
        if self._notes is not None and self._later is not None:
            self._is_looking, self._look_at = True, now + self._notes.look_seconds
            self._later(partial(self._look, self._notes))

    # -- the thread -----------------------------------------------------------------------------

    def _read(self, notes: Notes) -> None:
        try:
            found = notes.read()
            self._noted = {one.node for one in found}
            self._earlier.extend(found)
        finally:
            self.is_read = True

    def _write(self, notes: Notes, node: LeftOutNode) -> None:
        notes.write(node)
        self._noted.add(node.node)

    def _remove(self, notes: Notes, name: str) -> None:
        self._noted.discard(name)
        notes.remove(name)

    def _look(self, notes: Notes) -> None:
        try:
            gone = self._noted - notes.names()
            self._noted -= gone
            self._removed.extend(gone)
        finally:
            self._is_looking = False
