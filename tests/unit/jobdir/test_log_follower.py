"""Following what workers print: progress bars, rotated files, new incarnations, the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from elastic_ckpt.jobdir import log_follower, worker_logs
from elastic_ckpt.jobdir.log_follower import FIRST_LINES, LogFollower
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import LogWriter, log_files

BAR = b"".join(b"\r%3d%%|bar" % number for number in range(101))


class Following:
    """A follower whose sleep is a turn of the test: each writes, then looks again."""

    def __init__(self, job: JobDirectory, *ranks: int) -> None:
        self.now = 0.0
        self.over = False
        self.turns: Iterator[object] = iter(())
        self.follower = LogFollower(job, ranks, self._is_over, lambda: self.now, self._sleep)

    def _is_over(self) -> bool:
        return self.over

    def _sleep(self, seconds: float) -> None:
        self.now += 3.0
        if next(self.turns, None) is None:
            self.over = True

    def run(self, turns: Iterator[object]) -> list[str]:
        self.turns = turns
        return list(self.follower.lines())


def write(job: JobDirectory, incarnation: int, rank: int, data: bytes) -> bool:
    writer = LogWriter(job, incarnation, rank)
    writer.write(data)
    writer.close()
    return True


def test_a_progress_bar_is_one_line(job: JobDirectory) -> None:
    write(job, 1, 0, b"before\n" + BAR + b"\nafter\r\n\x1b[32mgreen\x1b[0m\r\n" + BAR)
    (log,) = log_files(job)
    assert list(log.lines()) == ["before", "100%|bar", "after", "green", "100%|bar"]
    assert log.tail() == ("before", "100%|bar", "after", "green", "100%|bar")


def test_a_bar_of_days_is_one_line_and_long_lines_stay(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in range(5, 40):
        monkeypatch.setattr(worker_logs, "MAX_LINE_BYTES", limit)
        write(job, limit, 0, BAR * 3 + b"\nend\n")
        assert list(log_files(job)[-1].lines()) == ["100%|bar", "end"], limit
    write(job, 99, 0, b"x" * 100)
    assert "".join(log_files(job)[-1].lines()) == "x" * 100


def test_it_begins_with_the_end_of_the_newest_incarnation(job: JobDirectory) -> None:
    write(job, 1, 0, b"old\n")
    write(job, 2, 0, b"".join(b"%d\n" % number for number in range(50)))
    lines = Following(job).run(iter([write(job, 2, 1, b"b\n")]))
    wanted = ["== incarnation 2, rank 0", *map(str, range(50 - FIRST_LINES, 50))]
    assert lines == [*wanted, "== incarnation 2, rank 1", "b"]


def test_what_comes_is_printed_with_new_ranks_and_incarnations(job: JobDirectory) -> None:
    def turns() -> Iterator[object]:
        yield write(job, 1, 0, b"one\npar")
        yield write(job, 1, 0, b"tial\n")
        yield write(job, 1, 1, b"other\n")
        yield write(job, 2, 0, b"".join(b"%d\n" % number for number in range(30)))
        yield write(job, 2, 0, b"no end of line")

    lines = Following(job).run(turns())
    assert lines[:6] == ["== incarnation 1, rank 0", "one", "partial", "== incarnation 1, rank 1",
                         "other", "== incarnation 2, rank 0"]  # fmt: skip
    assert lines[6:] == [*map(str, range(30)), "no end of line"]


def test_only_the_wanted_ranks(job: JobDirectory) -> None:
    for rank in range(4):
        write(job, 1, rank, b"of %d\n" % rank)
    lines = Following(job, 1, 3).run(iter(()))
    assert [line for line in lines if "==" not in line] == ["of 1", "of 3"]


def test_a_file_that_is_rotated_meanwhile_loses_nothing(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_logs, "MAX_LOG_BYTES", 100)
    writer = LogWriter(job, 1, 0)

    def turns() -> Iterator[object]:
        for number in range(100):
            writer.write(b"line %d\n" % number)
            yield True

    lines = Following(job).run(turns())
    assert lines[1:] == [f"line {number}" for number in range(100)]
    writer.close()


def test_a_bar_that_moves_is_shown_now_and_then(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_follower, "BAR_SECONDS", 6.0)

    def turns() -> Iterator[object]:
        for number in range(6):
            yield write(job, 1, 0, b"\r%d%%" % number)
        yield write(job, 1, 0, b"\rdone\n")

    lines = Following(job).run(turns())
    assert lines[0] == "== incarnation 1, rank 0" and lines[-1] == "done"
    shown = lines[1:-1]
    assert 2 <= len(shown) <= 4 and shown == sorted(shown) and all("%" in one for one in shown)
