"""A rank's slot on the board: its words, their writer, and a view that is never torn.

A sequence number frames the words of a step, odd while they are being written, so that a reader
never mixes two steps. Times are monotonic nanoseconds.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from elastic_ckpt.protocol.agreement import NOTHING_ENTERED
from elastic_ckpt.protocol.start_marks import Marks

SLOT_WORDS: Final = 128
WORD: Final = 8

# Words of a slot. The first six are the frame that a step rewrites; text and metrics are last.
_S_SEQUENCE, ENTERED, _S_FINISHED, _S_EPOCH, _S_SAMPLES, _S_BEAT = range(6)
_S_PID, _S_RANK, _S_PHASE, _S_SEEN, _S_OUTCOME, _S_EXIT_CODE = range(6, 12)
_S_START_STEP, _S_SAVED_STEP, _S_FIRST_ENTRY, _S_LEFT = range(12, 16)
_S_ENTRY, _S_GROUP_BEGAN, _S_GROUP_ENDED, _S_JOINED, _S_LOADED, _S_STEPPED = range(16, 22)
_S_SOURCE, _S_DECLARES, _S_BUSY_NS, _S_STEP_NS = 22, 25, 26, 27
_S_TOTAL_STEPS, _S_STEP_SAMPLES, _S_OWN_STEP, _S_STATE = range(28, 32)
_S_WANTS_SAVES, _S_SAMPLES_BEFORE = 23, 24
_S_REASON: Final = 32
_S_SESSION: Final = 72
_S_METRICS: Final = 80

_FRAME: Final = struct.Struct("@5q")  # native: each word is stored whole
_REASON_BYTES: Final = (_S_SESSION - _S_REASON) * WORD
_SESSION_BYTES: Final = (_S_METRICS - _S_SESSION) * WORD

MAX_METRICS: Final = 8
"""Room for metrics on the board; further ones are only in checkpoints."""

_METRIC_WORDS: Final = 6
_METRIC: Final = struct.Struct("@d40s")  # a value, which is written whole, and its name


class Phase(IntEnum):
    """What a rank is doing; ``status`` shows the names."""

    LAUNCHED = 0
    LOADING = 1
    TRAINING = 2
    SAVING = 3
    EVALUATING = 4
    LEAVING = 5
    FETCHING = 6
    BETWEEN = 7  # between two epochs, where the script does work of its own


class Source(IntEnum):
    """Where a rank loaded its state from."""

    NOTHING = 0
    DISK = 1
    MEMORY = 2
    BUCKET = 3


class SessionStage(IntEnum):
    """What became of a rank's newest Session."""

    NONE = 0  # the script has opened none
    OPEN = 1  # it has work that is not saved
    LEFT = 2  # an exception left it, and nothing was saved at its end
    SEALED = 3  # all its steps are in a checkpoint


class Outcome(IntEnum):
    """How a worker left; NONE for one that runs or was killed."""

    NONE = 0
    COMPLETED = 1  # finished its work
    STOPPED = 2  # left at the agreed stop step, after a sealed checkpoint
    STOPPED_UNSAVED = 3  # left at the agreed stop step, where no checkpoint exists
    FAILED = 4  # raised, or exited with a code


@dataclass(frozen=True)
class Slot:
    """A consistent view of one rank.

    Attributes:
        rank: global rank, -1 until the worker has started.
        pid: 0 until the worker has started.
        entered: the step that it has begun or is about to begin.
        epoch, sample_start_index: its position; samples of this epoch, of all ranks.
        beat: time of the last change; 0 for never.
        start_step: the step that it resumed from; ``NOTHING_ENTERED`` before that.
        saved_step: the step of the last checkpoint that it saw sealed; -1 for none.
        first_entry: time at which it began its first step; 0 for never.
        left: time of ``outcome``; 0 for never.
        reason: one line on why it failed; may be empty.
        declares: it declares its phases, as a Session does.
        busy_ns, step_ns: moving means of its own work in a step and of the step; 0 for unknown.
        total_steps: the last step of the script; 0 for unknown.
        samples_per_step: of all ranks; 0 for unknown.
        metrics: the script's newest values, by name.
        own_step: the step as the script or the session counts it, where that differs; else -1.
        session: name of the session that is open; empty for the unnamed one.
        session_stage: what became of its newest Session.
        samples_before: ``samples_per_step`` of the checkpoint that it resumed from.
        wants_saves: the script leaves it to the supervisor when to save.
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
    declares: bool = False
    busy_ns: int = 0
    step_ns: int = 0
    total_steps: int = 0
    samples_per_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    own_step: int = -1
    session: str = ""
    session_stage: SessionStage = SessionStage.NONE
    wants_saves: bool = False
    samples_before: int = 0

    @property
    def attached(self) -> bool:
        """Whether the script takes part: it opened a Session or called ``should_save``."""
        return self.start_step != NOTHING_ENTERED

    @property
    def shown_step(self) -> int:
        """Steps finished, as people and checkpoint names count them."""
        return self.finished if self.own_step < 0 else self.own_step


def read_slot(board: memoryview[int], base: int, local_rank: int) -> Slot:
    """Return a view of the slot at ``base`` that never mixes two of the rank's steps.

    A writer that was killed within a frame leaves its number odd; after about 20 ms of retries
    the words are returned as they are.
    """
    words: list[int] = []
    for attempt in range(120):
        if attempt >= 20:  # the scheduler paused the writer within a frame: let it finish
            time.sleep(0.0002)
        before = board[base + _S_SEQUENCE]
        words = board[base : base + SLOT_WORDS].tolist()
        if before % 2 == 0 and before == board[base + _S_SEQUENCE]:
            break
    return Slot(
        local_rank=local_rank,
        rank=words[_S_RANK],
        pid=words[_S_PID],
        entered=words[ENTERED],
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
        reason=_text(words[_S_REASON:_S_SESSION]),
        marks=Marks(*words[_S_ENTRY : _S_STEPPED + 1]),
        source=Source(words[_S_SOURCE]),
        declares=bool(words[_S_DECLARES]),
        busy_ns=words[_S_BUSY_NS],
        step_ns=words[_S_STEP_NS],
        total_steps=words[_S_TOTAL_STEPS],
        samples_per_step=words[_S_STEP_SAMPLES],
        metrics=_metrics(words[_S_METRICS:]),
        own_step=words[_S_OWN_STEP],
        samples_before=words[_S_SAMPLES_BEFORE],
        wants_saves=bool(words[_S_WANTS_SAVES]),
        session=_text(words[_S_SESSION:_S_METRICS]),
        session_stage=SessionStage(words[_S_STATE]),
    )


def clear_slot(board: memoryview[int], base: int) -> None:
    """Reset a slot to that of a rank that has not started."""
    for word in range(base, base + SLOT_WORDS):
        board[word] = 0
    board[base + ENTERED] = NOTHING_ENTERED
    board[base + _S_START_STEP] = NOTHING_ENTERED
    board[base + _S_RANK] = -1
    board[base + _S_SAVED_STEP] = -1
    board[base + _S_OWN_STEP] = -1


class SlotWriter:
    """Writes a rank's own slot; for the rank's main thread only."""

    def __init__(self, buffer: mmap.mmap | bytearray, words: memoryview[int], base: int) -> None:
        self._buffer = buffer
        self._words = words
        self._base = base
        self._frame_offset = (base + ENTERED) * WORD
        self._sequence = base + _S_SEQUENCE
        self._count = words[self._sequence] & ~1
        self._metrics: dict[str, int] = {}

    def step(self, entered: int, finished: int, epoch: int, samples: int) -> None:
        """Post the step that is about to begin. The hot path: no system call, no lasting
        allocation."""
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
        """Post that the worker process has started."""
        self._mark(_S_ENTRY)
        self._words[self._base + _S_RANK] = rank
        self._words[self._base + _S_BEAT] = time.monotonic_ns()
        self._words[self._base + _S_PID] = pid

    def attach(self, start_step: int, *, declares: bool = True) -> None:
        """Post that the script takes part from now on, resumed from ``start_step``."""
        self._words[self._base + _S_DECLARES] = declares
        self._words[self._base + _S_SAVED_STEP] = start_step if start_step > 0 else -1
        self._words[self._base + _S_START_STEP] = start_step

    def group_begins(self) -> None:
        """Mark the beginning of the default process group's creation."""
        self._mark(_S_GROUP_BEGAN)

    def group_is_made(self) -> None:
        """Mark the end of the default process group's creation."""
        self._mark(_S_GROUP_ENDED)

    def joined(self) -> None:
        """Mark that the script takes part, with its model built."""
        self._mark(_S_JOINED)

    def loaded(self, source: Source) -> None:
        """Mark that the state is loaded."""
        self._words[self._base + _S_SOURCE] = source
        self._mark(_S_LOADED)

    def stepped(self) -> None:
        """Mark the end of this incarnation's first optimizer step."""
        self._mark(_S_STEPPED)

    def pace(self, busy_ns: int, step_ns: int) -> None:
        """Post the mean durations of the rank's own work in a step and of the whole step."""
        self._words[self._base + _S_BUSY_NS] = busy_ns
        self._words[self._base + _S_STEP_NS] = step_ns

    def goal(self, total_steps: int, samples_per_step: int) -> None:
        """Post the script's last step, and the samples of one step."""
        self._words[self._base + _S_STEP_SAMPLES] = samples_per_step
        self._words[self._base + _S_TOTAL_STEPS] = total_steps

    def samples_before(self, samples: int) -> None:
        """Post the samples of one step of the checkpoint that it resumed from."""
        self._words[self._base + _S_SAMPLES_BEFORE] = samples

    def own_step(self, step: int) -> None:
        """Post the finished step as the script counts it."""
        self._words[self._base + _S_OWN_STEP] = step

    def session(self, name: str, *, wants_saves: bool = False) -> None:
        """Post the name of the session that is open, and whether its saves have no interval."""
        self._words[self._base + _S_WANTS_SAVES] = wants_saves
        offset = (self._base + _S_SESSION) * WORD
        data = name.encode()[:_SESSION_BYTES].ljust(_SESSION_BYTES, b"\0")
        self._buffer[offset : offset + _SESSION_BYTES] = data

    def session_stage(self, state: SessionStage) -> None:
        """Post what became of the rank's newest Session."""
        self._words[self._base + _S_STATE] = state

    def metric(self, name: str, value: float) -> None:
        """Post a value that the script reports; dropped if the board has no room."""
        index = self._metrics.get(name)
        if index is None:
            index = len(self._metrics)
            if index == MAX_METRICS:
                return
            self._metrics[name] = index
        offset = (self._base + _S_METRICS + index * _METRIC_WORDS) * WORD
        _METRIC.pack_into(self._buffer, offset, value, name.encode(errors="replace"))

    def first_entry(self) -> None:
        """Post that the first step of this incarnation begins now."""
        self._words[self._base + _S_FIRST_ENTRY] = time.monotonic_ns()

    def phase(self, phase: Phase) -> None:
        """Post what the rank is doing. Also a hot path: twice a step."""
        self._words[self._base + _S_BEAT] = time.monotonic_ns()
        self._words[self._base + _S_PHASE] = phase

    @property
    def posted_phase(self) -> Phase:
        """What the rank is doing, as it posted it last."""
        return Phase(self._words[self._base + _S_PHASE])

    def seen(self, number: int) -> None:
        """Post that this rank has seen every request up to ``number``."""
        self._words[self._base + _S_SEEN] = number

    def saved(self, step: int) -> None:
        """Post that a checkpoint of ``step`` is sealed."""
        self._words[self._base + _S_SAVED_STEP] = step

    def leave(self, outcome: Outcome, exit_code: int = 0, reason: str = "") -> None:
        """Post how the worker leaves; only the first call counts. A long reason is cut."""
        if self._words[self._base + _S_OUTCOME] != Outcome.NONE:
            return
        text = reason.encode(errors="replace")[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
        offset = (self._base + _S_REASON) * WORD
        self._buffer[offset : offset + _REASON_BYTES] = text
        self._words[self._base + _S_LEFT] = time.monotonic_ns()
        self._words[self._base + _S_EXIT_CODE] = exit_code
        self._words[self._base + _S_OUTCOME] = outcome

    def _mark(self, word: int) -> None:
        self._words[self._base + word] = time.monotonic_ns()


def _text(words: list[int]) -> str:
    data = struct.pack(f"@{len(words)}q", *words)
    return data.rstrip(b"\0").decode(errors="ignore")


def _metrics(words: list[int]) -> dict[str, float]:
    data = struct.pack(f"@{len(words)}q", *words)
    found = {}
    for index in range(MAX_METRICS):
        value, name = _METRIC.unpack_from(data, index * _METRIC_WORDS * WORD)
        text = name.rstrip(b"\0").decode(errors="ignore")
        if text:
            found[text] = value
    return found
