"""The board: a few kilobytes of local memory that one node's processes see each other through.

It lives in a ``memfd``: never on a network file system, no name to leave behind, gone with the
last process. Others open it as ``/proc/<supervisor>/fd/<n>``, which the kernel grants to the
same user alone.

Everything is a 64-bit word, because a single aligned word is read and written whole. What
belongs together in a rank's slot is framed by a sequence number, odd while it is being written,
so that a reader never mixes two steps. Times are nanoseconds on the monotonic clock, which all
processes of one host share.

Each word has one writer at a time: the agent (its watcher) writes the header and the answers, a
rank its own slot, the supervisor the deadline; and, once the agent and all workers are gone, the
supervisor clears what they left.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from elastic_ckpt.core.agreement import NOTHING_ENTERED, RING, Answer, RequestKind
from elastic_ckpt.core.recovery import Marks
from elastic_ckpt.errors import UsageError

_MAGIC: Final = 0x656C6173_74636B70
_VERSION: Final = 4
_MAX_SLOTS: Final = 4096  # ranks of one node
_HEADER_WORDS: Final = 64
_SLOT_WORDS: Final = 80

# Words of the header.
_H_MAGIC, _H_VERSION, _H_SLOTS, _H_INCARNATION, _H_FLAG, _H_ABORTED, _H_DEADLINE = range(7)
_H_OVER: Final = 7
_H_ANSWERS: Final = 16  # RING entries of (number, kind, step, 0)

# Words of a slot. The first six are the frame that a step rewrites; text fills the end.
_S_SEQUENCE, _S_ENTERED, _S_FINISHED, _S_EPOCH, _S_SAMPLES, _S_BEAT = range(6)
_S_PID, _S_RANK, _S_PHASE, _S_SEEN, _S_OUTCOME, _S_EXIT_CODE = range(6, 12)
_S_START_STEP, _S_SAVED_STEP, _S_FIRST_ENTRY, _S_LEFT = range(12, 16)
_S_ENTRY, _S_GROUP_BEGAN, _S_GROUP_ENDED, _S_JOINED, _S_LOADED, _S_STEPPED = range(16, 22)
_S_SOURCE, _S_SAVED_BYTES, _S_SAVED_NS, _S_DECLARES, _S_BUSY_NS, _S_STEP_NS = range(22, 28)
_S_REASON: Final = 32

_FRAME: Final = struct.Struct("@5q")  # native: each word is stored whole
_WORD: Final = 8
_REASON_BYTES: Final = (_SLOT_WORDS - _S_REASON) * _WORD


class Phase(IntEnum):
    """What a rank is doing; the names are what ``status`` shows."""

    LAUNCHED = 0
    LOADING = 1
    TRAINING = 2
    SAVING = 3
    EVALUATING = 4
    LEAVING = 5
    FETCHING = 6
    BETWEEN = 7  # two epochs: what the script does there is its own business


class Source(IntEnum):
    """Where the state that a rank began with came from."""

    NOTHING = 0
    DISK = 1
    MEMORY = 2


class Outcome(IntEnum):
    """How a worker left; NONE for one that runs, or was killed."""

    NONE = 0
    COMPLETED = 1  # its work is done
    STOPPED = 2  # it left at the agreed stop step, behind a sealed checkpoint
    STOPPED_UNSAVED = 3  # it left at the agreed stop step, and there is no checkpoint at all
    FAILED = 4  # it raised, or exited with a code


@dataclass(frozen=True)
class Slot:
    """A consistent view of one rank.

    Attributes:
        local_rank: index of the slot.
        rank: global rank, -1 until the worker has started.
        pid: 0 until the worker has started.
        entered: the step that it began or is about to begin.
        finished: optimizer steps finished.
        epoch, sample_start_index: its position; samples of this epoch, all ranks together.
        beat: monotonic time of the last change, nanoseconds; 0 for never.
        start_step: the step that it resumed from; ``NOTHING_ENTERED`` before that.
        saved_step: the step of the last checkpoint that it saw sealed; -1 for none.
        first_entry: monotonic time at which it began its first step, nanoseconds; 0 for never.
        left: monotonic time of ``outcome``, nanoseconds; 0 for never.
        reason: one line on why it failed; may be empty.
        marks: the moments of its start.
        source: where the state came from.
        saved_bytes: size of the last checkpoint, all ranks together; on the leader alone.
        saved_ns: nanoseconds that its save took.
        declares: it says when it does something else than train, as a Session does.
        busy_ns, step_ns: moving means of a step, its own work in it and the whole; 0 for unknown.
    """

    local_rank: int
    rank: int
    pid: int
    entered: int
    finished: int
    epoch: int
    sample_start_index: int
    beat: int
    phase: Phase
    seen: int
    outcome: Outcome
    exit_code: int
    start_step: int
    saved_step: int
    first_entry: int
    left: int = 0
    reason: str = ""
    marks: Marks = field(default_factory=Marks)
    source: Source = Source.NOTHING
    saved_bytes: int = 0
    saved_ns: int = 0
    declares: bool = False
    busy_ns: int = 0
    step_ns: int = 0

    @property
    def attached(self) -> bool:
        """Whether the script takes part: it resumed in a Session or called ``should_save``."""
        return self.start_step != NOTHING_ENTERED


class Board:
    """One node's board; see the module for who writes what."""

    def __init__(self, buffer: mmap.mmap | bytearray, fd: int = -1) -> None:
        self._buffer = buffer
        self._fd = fd
        self._words = memoryview(buffer).cast("q")
        self.slots = self._words[_H_SLOTS]

    # -- making and opening ---------------------------------------------------------------

    @classmethod
    def create(cls, slots: int) -> Board:
        """A new board in shared memory, with one slot per local rank."""
        size = (_HEADER_WORDS + slots * _SLOT_WORDS) * _WORD
        fd = os.memfd_create("elastic-ckpt-board")
        os.ftruncate(fd, size)
        buffer = mmap.mmap(fd, size)
        cls._format(memoryview(buffer).cast("q"), slots)
        return cls(buffer, fd)

    @classmethod
    def private(cls, slots: int = 1) -> Board:
        """A board of this process alone, for a script that runs without a supervisor."""
        buffer = bytearray((_HEADER_WORDS + slots * _SLOT_WORDS) * _WORD)
        cls._format(memoryview(buffer).cast("q"), slots)
        return cls(buffer)

    @classmethod
    def open(cls, path: str, *, writable: bool = True) -> Board:
        """Map an existing board.

        Raises:
            OSError: its owner is gone, or it belongs to another user.
            UsageError: another version of elastic-ckpt made it.
        """
        access = os.O_RDWR if writable else os.O_RDONLY
        fd = os.open(path, access | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{path} is no file, and so no board")
            if os.fstat(fd).st_size == 0:
                raise UsageError(f"{path} is empty, and no board")
            protection = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            buffer = mmap.mmap(fd, 0, access=protection)
        finally:
            os.close(fd)
        if not _is_board(memoryview(buffer)):
            raise UsageError(f"{path} is not a board of this version of elastic-ckpt")
        return cls(buffer)

    @property
    def path(self) -> str:
        """Where other processes open this board, while its maker lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @staticmethod
    def _format(words: memoryview[int], slots: int) -> None:
        words[_H_VERSION] = _VERSION
        words[_H_SLOTS] = slots
        _clear_slots(words, slots)
        words[_H_MAGIC] = _MAGIC

    # -- header: the agent's watcher, and the supervisor's deadline -------------------------

    def begin_incarnation(self, number: int) -> None:
        """Forget all ranks and requests; called while no worker runs."""
        self._words[_H_FLAG] = 0
        self._words[_H_ABORTED] = 0
        for index in range(_H_ANSWERS, _H_ANSWERS + 4 * RING):
            self._words[index] = 0
        _clear_slots(self._words, self.slots)
        # Last: who reads this number must not find the slots of the incarnation before.
        self._words[_H_INCARNATION] = number

    @property
    def incarnation(self) -> int:
        """The incarnation that the slots belong to."""
        return self._words[_H_INCARNATION]

    def end_incarnation(self) -> None:
        """Its workers are gone, and one that is started late has no place in it."""
        self._words[_H_OVER] = self._words[_H_INCARNATION]

    def is_over(self, number: int) -> bool:
        """Whether a worker of this incarnation has come too late."""
        return number != self._words[_H_INCARNATION] or number == self._words[_H_OVER]

    @property
    def flag(self) -> int:
        """Number of the newest flagged request, 0 for none."""
        return self._words[_H_FLAG]

    def raise_flag(self, number: int) -> None:
        """Make every rank stop before its next step until ``number`` is answered."""
        self._words[_H_FLAG] = number

    def post_answer(self, answer: Answer) -> None:
        """Publish the watcher's word; its number is written last."""
        base = _H_ANSWERS + 4 * (answer.number % RING)
        self._words[base] = 0
        self._words[base + 1] = int(answer.kind)
        self._words[base + 2] = answer.step
        self._words[base] = answer.number

    def answers(self) -> Mapping[int, Answer]:
        """All answers in the ring, by number."""
        found: dict[int, Answer] = {}
        for base in range(_H_ANSWERS, _H_ANSWERS + 4 * RING, 4):
            number, kind, step = self._words[base : base + 3]
            if number and number == self._words[base]:
                found[number] = Answer(number, RequestKind(kind), step)
        return found

    @property
    def aborted(self) -> int:
        """Requests up to this number will never be answered or served."""
        return self._words[_H_ABORTED]

    def abort(self, number: int) -> None:
        """Give up every request up to ``number``."""
        self._words[_H_ABORTED] = number

    @property
    def deadline(self) -> float | None:
        """When this node goes away, on the monotonic clock in seconds; None without a notice."""
        value = self._words[_H_DEADLINE]
        return value / 1e9 if value else None

    @deadline.setter
    def deadline(self, value: float | None) -> None:
        self._words[_H_DEADLINE] = 0 if value is None else int(value * 1e9)

    # -- slots ------------------------------------------------------------------------------

    def rank_slot(self, local_rank: int) -> SlotWriter:
        """The one writer of a rank's slot."""
        if not 0 <= local_rank < self.slots:
            raise UsageError(f"local rank {local_rank} has no slot on a board of {self.slots}")
        base = _HEADER_WORDS + local_rank * _SLOT_WORDS
        return SlotWriter(self._buffer, self._words, base)

    def entered(self) -> list[int]:
        """Every rank's ``entered`` word."""
        first = _HEADER_WORDS + _S_ENTERED
        return [self._words[first + index * _SLOT_WORDS] for index in range(self.slots)]

    def read_slot(self, local_rank: int) -> Slot:
        """A view of one rank that never mixes two of its steps.

        A writer that was killed in the middle of a frame leaves it odd for ever; after some
        tries, about 20 ms, the words are returned as they are.
        """
        base = _HEADER_WORDS + local_rank * _SLOT_WORDS
        words: list[int] = []
        for attempt in range(120):
            if attempt >= 20:  # the writer was put to sleep within a frame: let it finish
                time.sleep(0.0002)
            before = self._words[base + _S_SEQUENCE]
            words = self._words[base : base + _SLOT_WORDS].tolist()
            if before % 2 == 0 and before == self._words[base + _S_SEQUENCE]:
                break
        return Slot(
            local_rank=local_rank,
            rank=words[_S_RANK],
            pid=words[_S_PID],
            entered=words[_S_ENTERED],
            finished=words[_S_FINISHED],
            epoch=words[_S_EPOCH],
            sample_start_index=words[_S_SAMPLES],
            beat=words[_S_BEAT],
            phase=Phase(words[_S_PHASE]),
            seen=words[_S_SEEN],
            outcome=Outcome(words[_S_OUTCOME]),
            exit_code=words[_S_EXIT_CODE],
            start_step=words[_S_START_STEP],
            saved_step=words[_S_SAVED_STEP],
            first_entry=words[_S_FIRST_ENTRY],
            left=words[_S_LEFT],
            reason=_text(words[_S_REASON:]),
            marks=Marks(*words[_S_ENTRY : _S_STEPPED + 1]),
            source=Source(words[_S_SOURCE]),
            saved_bytes=words[_S_SAVED_BYTES],
            saved_ns=words[_S_SAVED_NS],
            declares=bool(words[_S_DECLARES]),
            busy_ns=words[_S_BUSY_NS],
            step_ns=words[_S_STEP_NS],
        )

    def read_slots(self) -> list[Slot]:
        """A view of every rank of this node."""
        return [self.read_slot(index) for index in range(self.slots)]


class SlotWriter:
    """A rank's own slot. Only the rank's main thread writes here."""

    def __init__(self, buffer: mmap.mmap | bytearray, words: memoryview[int], base: int) -> None:
        self._buffer = buffer
        self._words = words
        self._base = base
        self._frame_offset = (base + _S_ENTERED) * _WORD
        self._sequence = base + _S_SEQUENCE
        self._count = words[self._sequence] & ~1

    def step(self, entered: int, finished: int, epoch: int, samples: int) -> None:
        """Post the step that is about to begin; the hot path: no system call, no allocation
        that stays. The sequence number is odd while the frame is torn."""
        words, sequence = self._words, self._sequence
        count = self._count
        words[sequence] = count + 1
        _FRAME.pack_into(
            self._buffer, self._frame_offset, entered, finished, epoch, samples,
            time.monotonic_ns(),
        )  # fmt: skip
        words[sequence] = count + 2
        self._count = count + 2

    def launched(self, rank: int, pid: int) -> None:
        """The worker process has started."""
        self._mark(_S_ENTRY)
        self._words[self._base + _S_RANK] = rank
        self._words[self._base + _S_BEAT] = time.monotonic_ns()
        self._words[self._base + _S_PID] = pid

    def attach(self, start_step: int, *, declares: bool = True) -> None:
        """The script takes part from here on, having resumed from ``start_step``."""
        self._words[self._base + _S_DECLARES] = declares
        self._words[self._base + _S_SAVED_STEP] = start_step if start_step > 0 else -1
        self._words[self._base + _S_START_STEP] = start_step

    def group_begins(self) -> None:
        """The default process group is about to be made."""
        self._mark(_S_GROUP_BEGAN)

    def group_is_made(self) -> None:
        """The default process group is there."""
        self._mark(_S_GROUP_ENDED)

    def joined(self) -> None:
        """The script takes part, with its model built."""
        self._mark(_S_JOINED)

    def loaded(self, source: Source) -> None:
        """The state is in place."""
        self._words[self._base + _S_SOURCE] = source
        self._mark(_S_LOADED)

    def stepped(self) -> None:
        """The first optimizer step of this incarnation is finished."""
        self._mark(_S_STEPPED)

    def pace(self, busy_ns: int, step_ns: int) -> None:
        """How long a step takes: the rank's own work in it, and the whole."""
        self._words[self._base + _S_BUSY_NS] = busy_ns
        self._words[self._base + _S_STEP_NS] = step_ns

    def first_entry(self) -> None:
        """The first step of this incarnation begins now."""
        self._words[self._base + _S_FIRST_ENTRY] = time.monotonic_ns()

    def phase(self, phase: Phase) -> Phase:
        """Say what the rank is doing; returns what it did before."""
        before = Phase(self._words[self._base + _S_PHASE])
        self._words[self._base + _S_BEAT] = time.monotonic_ns()
        self._words[self._base + _S_PHASE] = phase
        return before

    def seen(self, number: int) -> None:
        """Every request up to ``number`` is on this rank's agenda."""
        self._words[self._base + _S_SEEN] = number

    def saved(self, step: int, size: int = 0, nanoseconds: int = 0) -> None:
        """A checkpoint of ``step`` is sealed: so many bytes, in so many nanoseconds."""
        self._words[self._base + _S_SAVED_BYTES] = size
        self._words[self._base + _S_SAVED_NS] = nanoseconds
        self._words[self._base + _S_SAVED_STEP] = step

    def leave(self, outcome: Outcome, exit_code: int = 0, reason: str = "") -> None:
        """The last word of a worker; only the first one counts. A long reason is cut."""
        if self._words[self._base + _S_OUTCOME] != Outcome.NONE:
            return
        text = reason.encode(errors="replace")[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
        offset = (self._base + _S_REASON) * _WORD
        self._buffer[offset : offset + _REASON_BYTES] = text
        self._words[self._base + _S_LEFT] = time.monotonic_ns()
        self._words[self._base + _S_EXIT_CODE] = exit_code
        self._words[self._base + _S_OUTCOME] = outcome

    def _mark(self, word: int) -> None:
        self._words[self._base + word] = time.monotonic_ns()


def _is_board(view: memoryview) -> bool:
    if len(view) < _HEADER_WORDS * _WORD or len(view) % _WORD:
        return False
    words = view.cast("q")
    return (
        words[_H_MAGIC] == _MAGIC
        and words[_H_VERSION] == _VERSION
        and 0 < words[_H_SLOTS] <= _MAX_SLOTS
        and len(words) == _HEADER_WORDS + words[_H_SLOTS] * _SLOT_WORDS
    )


def _text(words: list[int]) -> str:
    data = struct.pack(f"@{len(words)}q", *words)
    return data.rstrip(b"\0").decode(errors="ignore")


def _clear_slots(words: memoryview[int], slots: int) -> None:
    for index in range(slots):
        base = _HEADER_WORDS + index * _SLOT_WORDS
        for word in range(base, base + _SLOT_WORDS):
            words[word] = 0
        words[base + _S_ENTERED] = NOTHING_ENTERED
        words[base + _S_START_STEP] = NOTHING_ENTERED
        words[base + _S_RANK] = -1
        words[base + _S_SAVED_STEP] = -1
