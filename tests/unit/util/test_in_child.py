"""Work in a child process: the parent receives what it yields, and never waits without a bound."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest

from elastic_ckpt.errors import UsageError
from elastic_ckpt.util import in_child
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer, answers


@pytest.fixture(autouse=True)
def no_child_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(in_child, "PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(in_child, "KILL_SECONDS", 60.0)
    before = psutil.Process().children()  # multiprocessing's own, of a test in the same process
    yield
    assert psutil.Process().children() == before


def test_answers_come_one_by_one_from_another_process() -> None:
    def work() -> Generator[int, None, None]:
        yield os.getpid()
        yield from range(3)

    with answers(work, int, 10.0) as found:
        child, *numbers = found
    assert child != os.getpid() and numbers == [0, 1, 2]


def test_many_long_answers_arrive_intact() -> None:
    def work() -> Generator[str, None, None]:
        for number in range(10):
            yield "x" * 100_000 + str(number)

    with answers(work, str, 30.0) as found:
        assert [(len(one), one[-1]) for one in found] == [(100_001, str(n)) for n in range(10)]


def test_a_silent_child_is_killed_after_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_child, "PATIENCE_SECONDS", 0.1)

    def work() -> Generator[int, None, None]:
        yield os.getpid()
        time.sleep(600)

    received: list[int] = []
    silent = pytest.raises(NoAnswer, match=r"^did not answer within 0\.5 s$")
    with silent, answers(work, int, 0.5) as found:
        received.extend(found)
    assert len(received) == 1 and not psutil.pid_exists(received[0])


def test_a_parent_that_waits_is_called_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(in_child, "_IDLE_SECONDS", 0.01)
    told: list[float] = []

    def work() -> Generator[int, None, None]:
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        yield 7

    def idle(seconds: float) -> None:
        told.append(seconds)
        if len(told) == 3:
            (tmp_path / "go").touch()

    assert answer(work, int, 30.0, idle) == 7
    assert told == sorted(told) and told[0] > 0


def test_a_dead_child_is_no_answer() -> None:
    def work() -> Generator[int, None, None]:
        yield 1
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        pytest.raises(NoAnswer, match="ended without an answer"),
        answers(work, int, 10.0) as found,
    ):
        list(found)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError(13, "Permission denied", "/x"), "Permission denied"),
        (UsageError("give\nthat"), "give that"),
        (KeyError("odd"), r"KeyError\('odd'\)"),
    ],
)
def test_errors_reach_the_parent(error: Exception, text: str) -> None:
    def work() -> Generator[int, None, None]:
        raise error
        yield 1

    with pytest.raises(WorkFailed, match=f"^{text}$"):
        answer(work, int, 10.0)


def test_leaving_the_block_early_lets_the_child_clean_up(tmp_path: Path) -> None:
    def work() -> Generator[int, None, None]:
        (tmp_path / "made").touch()
        try:
            for number in range(10**9):
                yield number
                time.sleep(0.01)
        finally:
            (tmp_path / "made").unlink()

    with pytest.raises(KeyboardInterrupt), answers(work, int, 60.0) as found:
        for number in found:
            assert (tmp_path / "made").exists()
            if number == 3:
                raise KeyboardInterrupt
    assert not (tmp_path / "made").exists()


def test_a_child_inherits_no_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that hangs must not hold a lock, or block the reader of a pipe."""
    monkeypatch.setattr(in_child, "PATIENCE_SECONDS", 0.1)
    reading, writing = os.pipe()

    def work() -> Generator[int, None, None]:
        yield 1
        time.sleep(600)

    with answers(work, int, 60.0) as found:
        assert next(found) == 1
        os.close(writing)
        poll = select.poll()
        poll.register(reading)
        assert poll.poll(60_000) == [(reading, select.POLLHUP)]
    os.close(reading)
