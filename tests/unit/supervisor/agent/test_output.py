"""What the workers print: logged whole, shown only as fast as it is read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import LogWriter, rank_path
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.supervisor.agent.output import Output
from tests.waiting import until

LINE = b"x" * 99 + b"\n"
COUNT = 40_000  # 4 MB: more than a pipe and the queue hold


class Terminal:
    """A pipe in place of a terminal; nothing reads it until a test does."""

    def __init__(self) -> None:
        self.reading, self.shown = os.pipe()

    def read(self, ending: bytes) -> bytes:
        found = b""
        while ending not in found:
            found += os.read(self.reading, 65536)
        return found


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    found = [Terminal(), Terminal()]
    yield found
    for one in found:
        os.close(one.reading)


def start(job: JobDirectory, terminals: list[Terminal], directory: os.PathLike[str]) -> Output:
    board = Board.private()
    board.begin_incarnation(1)
    board.rank_slot(0).launched(0, os.getpid())
    return Output(job, board, directory, (terminals[0].shown, terminals[1].shown))


def test_worker_that_prints_to_a_paused_terminal_gets_on(job, terminals, tmp_path) -> None:
    output = start(job, terminals, tmp_path)

    def work() -> None:
        fifo = os.open(tmp_path / "out-0", os.O_WRONLY)
        for _ in range(COUNT):
            os.write(fifo, LINE)
        os.write(fifo, b"the end\n")
        os.close(fifo)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(30.0)
    assert not worker.is_alive(), "the worker waits for the terminal"
    assert output.tail(0)[-1] == "the end"
    assert rank_path(job, 1, 0, ".log").read_bytes() == LINE * COUNT + b"the end\n"

    found = terminals[0].read(b"elastic-ckpt logs")
    assert b" MB of output were not shown here, because nothing read it; the logs" in found
    assert found.startswith(LINE)


def test_other_stream_is_shown_meanwhile(job, terminals, tmp_path) -> None:
    start(job, terminals, tmp_path)
    fifos = [os.open(tmp_path / f"{name}-0", os.O_WRONLY) for name in ("out", "err")]
    for _ in range(COUNT):
        os.write(fifos[0], LINE)
    os.write(fifos[1], b"a warning\n")
    assert terminals[1].read(b"\n") == b"a warning\n"


def test_no_child_of_the_agent_inherits_the_terminal(job, terminals, tmp_path) -> None:
    before = [os.fstat(one.shown).st_ino for one in terminals]
    output = start(job, terminals, tmp_path)
    assert not {os.fstat(one.shown).st_ino for one in terminals} & set(before)
    os.write(terminals[1].shown, b"a warning of torch's\n")
    assert terminals[1].read(b"\n") == b"a warning of torch's\n"
    assert not rank_path(job, 1, 0, ".log").exists()
    output.flush()


def test_flush_brings_out_what_a_worker_printed_last(job, terminals, tmp_path) -> None:
    output = start(job, terminals, tmp_path)
    fifo = os.open(tmp_path / "out-0", os.O_WRONLY)
    os.write(fifo, LINE * 600)
    output.flush()
    assert terminals[0].read(LINE).startswith(LINE)
    until(lambda: rank_path(job, 1, 0, ".log").stat().st_size == 600 * len(LINE))


def test_disk_that_hangs_stops_no_worker_and_the_log_says_what_is_missing(
    job, terminals, tmp_path, monkeypatch
) -> None:
    answers, whole = threading.Event(), LogWriter.write

    def write(self: LogWriter, data: bytes) -> None:
        answers.wait(60.0)
        whole(self, data)

    monkeypatch.setattr(LogWriter, "write", write)
    output = start(job, terminals, tmp_path)

    def work() -> None:
        fifo = os.open(tmp_path / "out-0", os.O_WRONLY)
        for _ in range(4 * COUNT):
            os.write(fifo, LINE)
        os.close(fifo)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(30.0)
    assert not worker.is_alive(), "the worker waits for the disk"
    assert output.tail(0, 0.2) == ()
    answers.set()
    path = rank_path(job, 1, 0, ".log")
    until(lambda: path.exists() and b"of output are missing here" in path.read_bytes())
    assert output.tail(0)
    assert path.read_bytes().count(b"\nelastic-ckpt: ") == 1
    assert 80_000 <= path.read_bytes().count(LINE) < 4 * COUNT
