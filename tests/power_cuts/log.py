"""A log of ``dm-log-writes``, and the disks that a power cut can leave of it.

The log holds every write in the order in which the disk reported them durable: those before a
flush, the flush, marks. A disk keeps all that came before the last completed flush, and what was
written with FUA; of the rest it may have lost any part, torn at its blocks of 4 KiB.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

PAGE_BYTES: Final = 4096
_SECTOR_BYTES: Final = 512
_MAGIC: Final = 0x6A736677736872
_FLUSH, _FUA, _DISCARD, _MARK = 1, 2, 4, 8


@dataclass(frozen=True)
class Entry:
    """One entry of the log.

    Attributes:
        offset: in bytes, on the disk.
        place, size: of the data in the log, in bytes.
        flush: all entries before it are durable once it is there.
        fua: its own data are.
        mark: text of a mark, which writes nothing.
    """

    offset: int = 0
    place: int = 0
    size: int = 0
    flush: bool = False
    fua: bool = False
    mark: str = ""


@dataclass
class Log:
    """A log that was read: its entries, without the data."""

    path: Path
    entries: list[Entry] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Log:
        """Read a log; AssertionError if it is not one."""
        found = cls(path)
        with open(path, "rb") as file:
            magic, _, count, sector = struct.unpack("<QQQI", file.read(28))
            assert (magic, sector) == (_MAGIC, _SECTOR_BYTES), "this is no log of dm-log-writes"
            at = sector
            for _ in range(count):
                file.seek(at)
                start, sectors, flags, length = struct.unpack("<QQQQ", file.read(32))
                at += sector
                if flags & _MARK:
                    found.entries.append(Entry(mark=file.read(length).decode()))
                    continue
                size = 0 if flags & _DISCARD else sectors * sector
                found.entries.append(
                    Entry(start * sector, at, size, bool(flags & _FLUSH), bool(flags & _FUA))
                )
                at += size
        return found

    @property
    def marks(self) -> list[tuple[int, str]]:
        """Return (position, text) of each mark, in order."""
        return [(at, one.mark) for at, one in enumerate(self.entries) if one.mark]

    @property
    def flushes(self) -> int:
        return sum(one.flush for one in self.entries)

    def position(self, mark: str) -> int:
        """Return where a mark is."""
        return next(at for at, text in self.marks if text == mark)


Write = tuple[int, bytes]
"""An offset on the disk, in bytes, and what is written there."""


class Disk:
    """A disk without power: what is durable, as the log is walked through."""

    def __init__(self, log: Log, base: Path) -> None:
        """``base`` is the disk before the first entry."""
        self._log = log
        self._data = os.open(log.path, os.O_RDONLY)
        self._size = base.stat().st_size
        self._pages: dict[int, bytearray] = {}
        self._next = 0  # what is before it has been written, or is pending
        self._pending: list[Entry] = []
        for offset, data in _extents(base):
            self._put(offset, data)

    def close(self) -> None:
        os.close(self._data)

    def cut(self, position: int, dice: random.Random | None, image: Path) -> None:
        """Write the disk that a power cut just after an entry leaves, to a new file.

        Positions must not decrease from call to call.

        Args:
            dice: decides what is lost that was not durable; None keeps all of it.
        """
        self._go_on(position)
        lost = dice.choice((1.0, 0.8, 0.5, 0.2)) if dice else 0.0
        with open(image, "wb") as file:
            file.truncate(self._size)
            for offset, data in _runs(self._pages):
                os.pwrite(file.fileno(), data, offset)
            for entry in self._pending:
                for offset, data in self._what_is_left(entry, lost, dice):
                    os.pwrite(file.fileno(), data, offset)

    def _go_on(self, position: int) -> None:
        while self._next <= position:
            entry = self._log.entries[self._next]
            self._next += 1
            if entry.flush:
                for before in self._pending:
                    self._put(before.offset, self._data_of(before))
                self._pending = []
            if entry.size:
                self._pending.append(entry)

    def _what_is_left(
        self, entry: Entry, lost: float, dice: random.Random | None
    ) -> Iterator[Write]:
        data = self._data_of(entry)
        if dice is None or entry.fua:
            yield entry.offset, data
        elif dice.random() < 0.5:  # all of it or nothing
            if dice.random() >= lost:
                yield entry.offset, data
        else:
            for at in range(0, entry.size, PAGE_BYTES):
                if dice.random() >= lost:
                    yield entry.offset + at, data[at : at + PAGE_BYTES]

    def _data_of(self, entry: Entry) -> bytes:
        return os.pread(self._data, entry.size, entry.place)

    def _put(self, offset: int, data: bytes) -> None:
        at = 0
        while at < len(data):
            number, inside = divmod(offset + at, PAGE_BYTES)
            piece = data[at : at + PAGE_BYTES - inside]
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = bytearray(PAGE_BYTES)
            page[inside : inside + len(piece)] = piece
            at += len(piece)


def _extents(path: Path) -> Iterator[Write]:
    """Yield what a sparse file holds, without pages of zeros."""
    with open(path, "rb") as file:
        end, at = path.stat().st_size, 0
        while at < end:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                return
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            for offset in range(start, at, PAGE_BYTES):
                page = os.pread(file.fileno(), PAGE_BYTES, offset)
                if any(page):
                    yield offset, page


def _runs(pages: dict[int, bytearray]) -> Iterator[Write]:
    """Yield the pages in order, neighbours together."""
    run: list[bytearray] = []
    start = 0
    for number in sorted(pages):
        if run and number != start + len(run):
            yield start * PAGE_BYTES, b"".join(run)
            run = []
        if not run:
            start = number
        run.append(pages[number])
    if run:
        yield start * PAGE_BYTES, b"".join(run)
