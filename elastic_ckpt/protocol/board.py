"""The board: a few kilobytes of memory that the processes of one node share.

It lives in a ``memfd``: never on a network file system, without a name to clean up, freed with
the last process. Other processes open it as ``/proc/<supervisor>/fd/<n>``, which the kernel allows
only to the same user.

Everything is a 64-bit word, because one aligned word is read and written atomically; the words of
a rank's step are framed (``slot.py``). Times are nanoseconds on the monotonic clock, which all
processes of a host share.

Each word has one writer at a time: the agent writes the header, the answers and the outcome of a
rank that is gone, a rank its own slot, the supervisor the deadline and whether a node that leaves
hands over; after the agent and all workers are gone, the supervisor clears what they left.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Mapping
from typing import Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.protocol.agreement import RING, RequestAnswer, RequestKind
from elastic_ckpt.protocol.slot import (
    ENTERED,
    SLOT_WORDS,
    WORD,
    Slot,
    SlotWriter,
    clear_slot,
    read_slot,
)

_MAGIC: Final = 0x656C6173_74636B70
_VERSION: Final = 7
_MAX_SLOTS: Final = 4096  # ranks of one node
_HEADER_WORDS: Final = 64

# Words of the header.
_H_MAGIC, _H_VERSION, _H_SLOTS, _H_INCARNATION, _H_FLAG, _H_ABORTED, _H_DEADLINE = range(7)
_H_OVER: Final = 7
_H_HAND_OVER: Final = 8
_H_ANSWERS: Final = 16  # RING entries of (number, kind, step, 0)


class Board:
    """A node's board; see the module for who writes what."""

    def __init__(self, buffer: mmap.mmap | bytearray, fd: int = -1) -> None:
        self._buffer = buffer
        self._fd = fd
        self._words = memoryview(buffer).cast("q")
        self.slots = self._words[_H_SLOTS]

    # -- making and opening ---------------------------------------------------------------

    @classmethod
    def create(cls, slots: int) -> Board:
        """Create a board in shared memory, with one slot per local rank."""
        size = (_HEADER_WORDS + slots * SLOT_WORDS) * WORD
        fd = os.memfd_create("elastic-ckpt-board")
        os.ftruncate(fd, size)
        buffer = mmap.mmap(fd, size)
        cls._format(memoryview(buffer).cast("q"), slots)
        return cls(buffer, fd)

    @classmethod
    def private(cls, slots: int = 1) -> Board:
        """Create a board of this process only, for a script without a supervisor."""
        buffer = bytearray((_HEADER_WORDS + slots * SLOT_WORDS) * WORD)
        cls._format(memoryview(buffer).cast("q"), slots)
        return cls(buffer)

    @classmethod
    def open(cls, path: str, *, writable: bool = True) -> Board:
        """Map an existing board. OSError if its owner is gone or it is another user's, UsageError
        if it is not a board of this version of elastic-ckpt."""
        access = os.O_RDWR if writable else os.O_RDONLY
        fd = os.open(path, access | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{path} is not a board: not a regular file")
            if os.fstat(fd).st_size == 0:
                raise UsageError(f"{path} is not a board: empty")
            protection = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            buffer = mmap.mmap(fd, 0, access=protection)
        finally:
            os.close(fd)
        if not _is_board(memoryview(buffer)):
            raise UsageError(f"{path} is not a board of this version of elastic-ckpt")
        return cls(buffer)

    @property
    def path(self) -> str:
        """The path at which other processes open this board while its creator lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @staticmethod
    def _format(words: memoryview[int], slots: int) -> None:
        words[_H_VERSION] = _VERSION
        words[_H_SLOTS] = slots
        _clear_slots(words, slots)
        words[_H_MAGIC] = _MAGIC

    # -- header: the agent's watcher, and the supervisor's deadline -------------------------

    def begin_incarnation(self, number: int) -> None:
        """Clear all slots and requests; call while no worker runs."""
        self._words[_H_FLAG] = 0
        self._words[_H_ABORTED] = 0
        for index in range(_H_ANSWERS, _H_ANSWERS + 4 * RING):
            self._words[index] = 0
        _clear_slots(self._words, self.slots)
        # Last: a reader of this number must not find the previous incarnation's slots.
        self._words[_H_INCARNATION] = number

    @property
    def incarnation(self) -> int:
        """The incarnation that the slots belong to."""
        return self._words[_H_INCARNATION]

    def end_incarnation(self) -> None:
        """Record that the incarnation's workers are gone, so that late ones leave."""
        self._words[_H_OVER] = self._words[_H_INCARNATION]

    def is_over(self, number: int) -> bool:
        """Whether a worker of this incarnation started too late."""
        return number != self._words[_H_INCARNATION] or number == self._words[_H_OVER]

    @property
    def flag(self) -> int:
        """The newest flagged request's number, 0 for none."""
        return self._words[_H_FLAG]

    def raise_flag(self, number: int) -> None:
        """Make every rank wait before its next step until ``number`` is answered."""
        self._words[_H_FLAG] = number

    def post_answer(self, answer: RequestAnswer) -> None:
        """Publish the watcher's answer; its number is written last."""
        base = _H_ANSWERS + 4 * (answer.number % RING)
        self._words[base] = 0
        self._words[base + 1] = int(answer.kind)
        self._words[base + 2] = answer.step
        self._words[base] = answer.number

    def answers(self) -> Mapping[int, RequestAnswer]:
        """Return all answers in the ring, by number."""
        found: dict[int, RequestAnswer] = {}
        for base in range(_H_ANSWERS, _H_ANSWERS + 4 * RING, 4):
            number, kind, step = self._words[base : base + 3]
            if number and number == self._words[base]:
                found[number] = RequestAnswer(number, RequestKind(kind), step)
        return found

    @property
    def stop_wanted(self) -> bool:
        """Whether the ranks are to stop, because this node goes or the job is to restart."""
        return any(answer.kind is RequestKind.STOP for answer in self.answers().values())

    @property
    def aborted(self) -> int:
        """The newest request that is given up, with all before it."""
        return self._words[_H_ABORTED]

    def abort(self, number: int) -> None:
        """Give up every request up to ``number``."""
        self._words[_H_ABORTED] = number

    @property
    def deadline(self) -> float | None:
        """When this node goes away, in monotonic seconds; None without a notice."""
        value = self._words[_H_DEADLINE]
        return value / 1e9 if value else None

    @deadline.setter
    def deadline(self, value: float | None) -> None:
        self._words[_H_DEADLINE] = 0 if value is None else int(value * 1e9)

    @property
    def hand_over_seconds(self) -> float:
        """How long a node that leaves is held up at most if others keep what it has in memory; 0 if
        it is free sooner with a save to the disk."""
        return self._words[_H_HAND_OVER] / 1e9

    @hand_over_seconds.setter
    def hand_over_seconds(self, value: float) -> None:
        self._words[_H_HAND_OVER] = int(value * 1e9)

    # -- slots ------------------------------------------------------------------------------

    def rank_slot(self, local_rank: int) -> SlotWriter:
        """Return the writer of a rank's slot, of which there is one."""
        if not 0 <= local_rank < self.slots:
            raise UsageError(f"local rank {local_rank} has no slot on a board of {self.slots}")
        return SlotWriter(self._buffer, self._words, self._base(local_rank))

    def entered(self) -> list[int]:
        """Return every rank's ``entered`` word."""
        first = _HEADER_WORDS + ENTERED
        return [self._words[first + index * SLOT_WORDS] for index in range(self.slots)]

    def read_slot(self, local_rank: int) -> Slot:
        """Return a view of one rank that never mixes two of its steps."""
        return read_slot(self._words, self._base(local_rank), local_rank)

    @staticmethod
    def _base(local_rank: int) -> int:
        return _HEADER_WORDS + local_rank * SLOT_WORDS

    def read_slots(self) -> list[Slot]:
        """Return a view of every rank of this node."""
        return [self.read_slot(index) for index in range(self.slots)]


def _is_board(view: memoryview) -> bool:
    if len(view) < _HEADER_WORDS * WORD or len(view) % WORD:
        return False
    words = view.cast("q")
    return (
        words[_H_MAGIC] == _MAGIC
        and words[_H_VERSION] == _VERSION
        and 0 < words[_H_SLOTS] <= _MAX_SLOTS
        and len(words) == _HEADER_WORDS + words[_H_SLOTS] * SLOT_WORDS
    )


def _clear_slots(words: memoryview[int], slots: int) -> None:
    for index in range(slots):
        clear_slot(words, _HEADER_WORDS + index * SLOT_WORDS)
