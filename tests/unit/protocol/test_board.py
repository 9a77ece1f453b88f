"""The board: reads that never mix two steps, requests and their answers, and strangers' files."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from elastic_ckpt.errors import UsageError
from elastic_ckpt.protocol import board as board_module
from elastic_ckpt.protocol.agreement import NOTHING_ENTERED, RequestAnswer, RequestKind
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome, Phase, Slot, Source
from elastic_ckpt.protocol.start_marks import Marks
from tests.waiting import until

SAVE, STOP = RequestKind.SAVE, RequestKind.STOP
RING = board_module.RING
FRESH = Board.private().read_slot(0)

HAMMER = """
import sys
from elastic_ckpt.protocol.board import Board

board = Board.open(sys.argv[1])
slot = board.rank_slot(1)
number = 0
while not board.aborted:
    number += 1
    slot.step(number, number, number, number)
    for _ in range(200):  # or there would hardly be a moment between two frames
        pass
slot.saved(number)
"""

OTHER = """
import os, sys
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome, Phase

board = Board.open(sys.argv[1])
slot = board.rank_slot(1)
slot.launched(5, os.getpid())
slot.attach(7)
slot.step(9, 8, 2, 640)
slot.phase(Phase.TRAINING)
slot.seen(board.flag)
slot.leave(Outcome.STOPPED)
print(sorted(board.answers()), board.deadline, board.incarnation)
"""


@pytest.fixture(params=["shared", "private"])
def board(request: pytest.FixtureRequest) -> Board:
    return Board.create(3) if request.param == "shared" else Board.private(3)


def python(code: str, path: str) -> list[str]:
    return [sys.executable, "-c", code, path]


def same(slot: Slot) -> bool:
    """Whether all words of a step that was posted as (n, n, n, n) are of one n."""
    return slot.entered == slot.finished == slot.epoch == slot.sample_start_index


# -- torn reads -----------------------------------------------------------------------------------


class RacingWords:
    """The words of a board whose writer continues between a reader's accesses, and during one.

    Args:
        advances: how many more words are written before each access, one after another; when
            they are used up the writer finishes all its frames.
        split: a read of the whole slot takes this many words, then lets the writer write
            ``during`` more, and takes the rest.
    """

    FRAMES = 4

    def __init__(self, board: Board, advances: list[int], split: int, during: int) -> None:
        self._words: Any = board._words
        self._words[board_module._HEADER_WORDS + board_module.ENTERED] = 0
        self._advances = iter(advances)
        self._split = split
        self._during = during
        self._writes = self._all_writes()
        self.raw: list[int] = []

    def _all_writes(self) -> Any:
        base = board_module._HEADER_WORDS
        for number in range(1, self.FRAMES + 1):
            self._words[base] = 2 * number - 1
            yield
            for word in range(base + 1, base + 6):
                self._words[word] = number
                yield
            self._words[base] = 2 * number
            yield

    def _advance(self, count: int | None) -> None:
        for _ in itertools.islice(self._writes, count):
            pass

    def __getitem__(self, key: int | slice) -> Any:
        self._advance(next(self._advances, None))
        if isinstance(key, int):
            return self._words[key]
        first = self._words[key].tolist()[: self._split]
        self._advance(self._during)
        found = first + self._words[key].tolist()[self._split :]
        self.raw = self.raw or found
        return memoryview(struct.pack(f"{len(found)}q", *found)).cast("q")


def test_no_interleaving_of_a_writer_and_a_reader_mixes_two_steps() -> None:
    """A frame is seven writes; the reader meets the writer in each of them."""
    torn = 0
    for before, *advances in itertools.product(range(15), (0, 1, 3, 7), (0, 1, 6, 7)):
        for split, during in itertools.product(range(1, 7), (0, 1, 3, 7)):
            board = Board.private()
            racing = RacingWords(board, [before, *advances], split, during)
            board._words = racing  # type: ignore[assignment]
            slot = board.read_slot(0)
            assert same(slot)
            torn += len(set(racing.raw[1:6])) > 1
    assert torn > 500  # what was avoided


def test_a_busy_writer_is_never_read_between_two_steps() -> None:
    board = Board.create(2)
    with subprocess.Popen(python(HAMMER, board.path)) as writer:
        try:
            until(lambda: board.entered()[1] > 100)
            limit = time.monotonic() + 1.0
            seen = [0]
            while time.monotonic() < limit:
                began = time.perf_counter()
                slot = board.read_slot(1)
                # A reader gives up after a thousand tries: on a busy machine the writer may
                # stand still in a frame for longer. Only quick reads are known not to have.
                if time.perf_counter() - began < 50e-6:
                    assert same(slot)
                    assert slot.entered >= seen[-1]
                    seen.append(slot.entered)
        finally:
            board.abort(1)
        assert writer.wait(timeout=20) == 0
    assert len(set(seen)) > 5
    last = board.read_slot(1)
    assert last.entered == last.saved_step >= seen[-1]
    assert board.read_slot(0) == FRESH


def test_a_frame_of_a_dead_writer_blocks_no_reader_and_the_next_writer_repairs_it() -> None:
    board = Board.private()
    slot = board.rank_slot(0)
    slot.step(4, 3, 0, 24)
    board._words[board_module._HEADER_WORDS] += 1
    began = time.monotonic()
    assert board.read_slot(0).entered == 4
    assert time.monotonic() - began < 1.0
    board.rank_slot(0).step(5, 4, 0, 32)
    board.rank_slot(0).step(6, 5, 0, 40)
    assert board._words[board_module._HEADER_WORDS] % 2 == 0
    assert board.read_slot(0).entered == 6


# -- slots ----------------------------------------------------------------------------------------


def test_a_new_slot_is_empty(board: Board) -> None:
    assert board.read_slots() == [replace(FRESH, local_rank=index) for index in range(3)]
    assert (FRESH.rank, FRESH.pid, FRESH.saved_step, FRESH.exit_code) == (-1, 0, -1, 0)
    assert (FRESH.entered, FRESH.start_step) == (NOTHING_ENTERED, NOTHING_ENTERED)
    assert (FRESH.phase, FRESH.outcome) == (Phase.LAUNCHED, Outcome.NONE)
    assert not FRESH.attached


def fill(board: Board, index: int) -> None:
    """Have a rank say everything that it can say."""
    slot = board.rank_slot(index)
    slot.launched(10 + index, 1000 + index)
    slot.group_begins()
    slot.group_is_made()
    slot.joined()
    slot.loaded(Source.MEMORY)
    slot.attach(20)
    slot.step(31, 30, 2, 240)
    slot.first_entry()
    slot.phase(Phase.SAVING)
    slot.seen(3)
    slot.stepped()
    slot.saved(30)
    slot.leave(Outcome.FAILED, 7)


def test_a_rank_writes_its_own_slot_and_no_other(board: Board) -> None:
    before = time.monotonic_ns()
    fill(board, 1)
    slot = board.read_slot(1)
    assert before <= slot.first_entry <= slot.beat <= time.monotonic_ns()
    marks = astuple(slot.marks)
    assert before <= marks[0] and list(marks) == sorted(marks)
    assert replace(slot, beat=0, first_entry=0, left=0, marks=Marks()) == Slot(
        local_rank=1, rank=11, pid=1001, entered=31, finished=30, epoch=2, sample_start_index=240,
        beat=0, phase=Phase.SAVING, seen=3, outcome=Outcome.FAILED, exit_code=7, start_step=20,
        saved_step=30, first_entry=0, source=Source.MEMORY, declares=True,
    )  # fmt: skip
    assert slot.attached
    assert board.entered() == [NOTHING_ENTERED, 31, NOTHING_ENTERED]
    assert [board.read_slot(index) for index in (0, 2)] == [
        replace(FRESH, local_rank=index) for index in (0, 2)
    ]
    assert (board.flag, board.aborted, board.deadline, board.answers()) == (0, 0, None, {})


@pytest.mark.parametrize(("start", "saved"), [(0, -1), (1, 1), (50, 50)])
def test_a_resumed_rank_has_a_checkpoint_and_a_fresh_one_has_none(start: int, saved: int) -> None:
    board = Board.private()
    board.rank_slot(0).attach(start)
    slot = board.read_slot(0)
    assert (slot.start_step, slot.saved_step, slot.attached) == (start, saved, True)


def test_a_rank_can_read_the_phase_that_it_posted(board: Board) -> None:
    slot = board.rank_slot(0)
    assert slot.posted_phase is Phase.LAUNCHED
    slot.phase(Phase.SAVING)
    assert slot.posted_phase is Phase.SAVING
    assert board.read_slot(0).phase is Phase.SAVING


def test_each_word_of_a_step_moves_the_beat(board: Board) -> None:
    slot = board.rank_slot(2)
    beats = []
    for number in range(5):
        slot.step(number, number, 0, 0)
        beats.append(board.read_slot(2).beat)
    assert beats == sorted(beats)
    assert 0 < beats[0] < beats[-1]


@pytest.mark.parametrize("index", [-1, 3, 1000])
def test_a_local_rank_without_a_slot(board: Board, index: int) -> None:
    with pytest.raises(UsageError, match="no slot"):
        board.rank_slot(index)


# -- requests -------------------------------------------------------------------------------------


def test_answers_are_found_by_number_and_the_ring_keeps_the_newest(board: Board) -> None:
    posted = {}
    for number in range(1, 4 * RING):
        answer = RequestAnswer(number, STOP if number % 3 else SAVE, number - 5)
        board.post_answer(answer)
        posted[number] = answer
        assert board.answers() == {n: a for n, a in posted.items() if n > number - RING}


def test_nothing_entered_is_an_answer(board: Board) -> None:
    board.post_answer(RequestAnswer(1, STOP, NOTHING_ENTERED))
    assert board.answers() == {1: RequestAnswer(1, STOP, NOTHING_ENTERED)}


def test_a_half_written_answer_is_not_read() -> None:
    """Its number is written last."""
    writes: list[tuple[int, int]] = []

    class Noting:
        def __setitem__(self, index: int, value: int) -> None:
            writes.append((index, value))

    board = Board.private()
    words = board._words
    board._words = Noting()  # type: ignore[assignment]
    board.post_answer(RequestAnswer(2, STOP, 9))
    board._words = words
    for index, value in writes[:-1]:
        words[index] = value
        assert board.answers() == {}
    words[writes[-1][0]] = writes[-1][1]
    assert board.answers() == {2: RequestAnswer(2, STOP, 9)}


def test_flag_and_abort_are_numbers(board: Board) -> None:
    board.raise_flag(3)
    assert (board.flag, board.aborted) == (3, 0)
    board.abort(2)
    assert (board.flag, board.aborted) == (3, 2)
    assert board.answers() == {}


def test_a_deadline_can_be_set_moved_and_cleared(board: Board) -> None:
    assert board.deadline is None
    for seconds in (1234.5, 1200.25):
        board.deadline = seconds
        assert board.deadline == pytest.approx(seconds, abs=1e-8)
    board.deadline = None
    assert board.deadline is None


def test_a_new_incarnation_forgets_every_rank_and_request_but_not_the_deadline(
    board: Board,
) -> None:
    board.deadline = 77.0
    for number in range(1, RING + 3):
        board.raise_flag(number)
        board.post_answer(RequestAnswer(number, SAVE, 5))
    board.abort(2)
    for index in range(3):
        fill(board, index)
    board.begin_incarnation(4)
    assert board.incarnation == 4
    assert (board.flag, board.aborted, board.answers()) == (0, 0, {})
    assert board.read_slots() == [replace(FRESH, local_rank=index) for index in range(3)]
    assert board.deadline == 77.0
    board.rank_slot(0).step(1, 0, 0, 0)
    assert board.read_slot(0).entered == 1


# -- other processes ------------------------------------------------------------------------------


def test_another_process_opens_the_board_by_its_path_and_both_see_each_other() -> None:
    board = Board.create(2)
    board.begin_incarnation(6)
    board.raise_flag(2)
    board.post_answer(RequestAnswer(1, SAVE, 3))
    board.post_answer(RequestAnswer(2, STOP, 9))
    board.deadline = 8.5
    done = subprocess.run(
        python(OTHER, board.path), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split("\n")[0] == "[1, 2] 8.5 6"
    slot = board.read_slot(1)
    assert (slot.rank, slot.entered, slot.finished, slot.epoch) == (5, 9, 8, 2)
    assert (slot.sample_start_index, slot.seen, slot.start_step) == (640, 2, 7)
    assert (slot.phase, slot.outcome) == (Phase.TRAINING, Outcome.STOPPED)
    assert slot.pid not in (0, os.getpid())


def test_two_mappings_of_one_board_are_one_board() -> None:
    board = Board.create(1)
    other = Board.open(board.path)
    other.rank_slot(0).step(3, 2, 1, 16)
    assert board.entered() == [3]
    board.raise_flag(1)
    assert other.flag == 1


def test_a_read_only_board_cannot_be_written() -> None:
    board = Board.create(1)
    board.rank_slot(0).step(3, 2, 1, 16)
    looking = Board.open(board.path, writable=False)
    assert looking.read_slot(0) == board.read_slot(0)
    with pytest.raises(TypeError):
        looking.raise_flag(1)
    with pytest.raises(TypeError):
        looking.rank_slot(0).step(4, 3, 1, 24)
    assert (board.flag, board.entered()) == (0, [3])


def test_a_board_whose_owner_is_gone_cannot_be_opened() -> None:
    code = "from elastic_ckpt.protocol.board import Board; print(Board.create(1).path)"
    path = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()
    assert path.startswith("/proc/")
    with pytest.raises(OSError):
        Board.open(path)


def stranger(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "stranger"
    path.write_bytes(data)
    return str(path)


def words_of(board: Board) -> list[int]:
    return board._words.tolist()


@pytest.mark.parametrize("word", [0, 1], ids=["magic", "version"])
def test_another_versions_board_is_refused(tmp_path: Path, word: int) -> None:
    words = words_of(Board.private())
    assert Board.open(stranger(tmp_path, struct.pack(f"{len(words)}q", *words))).slots == 1
    words[word] += 1
    path = stranger(tmp_path, struct.pack(f"{len(words)}q", *words))
    with pytest.raises(UsageError, match="not a board of this version"):
        Board.open(path)


@pytest.mark.parametrize("size", [0, 5, 8, 512], ids=["empty", "odd", "one word", "no slots"])
def test_a_file_too_short_for_a_board_is_refused(tmp_path: Path, size: int) -> None:
    words = words_of(Board.private())
    path = stranger(tmp_path, struct.pack(f"{len(words)}q", *words)[:size])
    with pytest.raises(UsageError):
        Board.open(path)
