"""Lines about long work: none about short work, and no number that cannot be."""

from __future__ import annotations

import pytest

from elastic_ckpt.util.progress import Progress, human_bytes, in_lines, unwatched


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_short_work_is_not_worth_a_word(clock: Clock) -> None:
    said: list[str] = []
    progress = Progress("verifying x", 100, said.append, clock)
    for _ in range(100):
        clock.now += 0.0199
        progress.advance(1)
    assert said == []


def test_long_work_says_a_line_every_two_seconds(clock: Clock) -> None:
    said: list[str] = []
    progress = Progress("verifying x", 10_000_000_000, said.append, clock)
    for _ in range(52):
        clock.now += 0.125
        progress.advance(125_000_000)
    assert said == [
        "verifying x: 2.0 GB of 10.0 GB, 1.0 GB/s, 8 s left",
        "verifying x: 4.0 GB of 10.0 GB, 1.0 GB/s, 6 s left",
        "verifying x: 6.0 GB of 10.0 GB, 1.0 GB/s, 4 s left",
    ]


@pytest.mark.parametrize(
    ("total", "done", "seconds"),
    [(0, 0, 0.0), (0, 0, 5.0), (0, 10, 5.0), (100, 0, 5.0), (100, 500, 5.0), (100, 100, 0.0),
     (10**18, 1, 1e-12)],
)  # fmt: skip
def test_no_numbers_make_it_fail(clock: Clock, total: int, done: int, seconds: float) -> None:
    """Nothing to do, nothing done yet, more done than there was, no time passed."""
    progress = Progress("x", total, lambda _: None, clock)
    clock.now += seconds
    progress.advance(done)
    line = progress.line(clock.now)
    assert line.startswith("x: ") and line.endswith(" s left")
    assert "-" not in line and "nan" not in line and "inf" not in line


def test_a_clock_that_stands_still_says_nothing(clock: Clock) -> None:
    said: list[str] = []
    progress = Progress("x", 10, said.append, clock)
    for _ in range(10):
        progress.advance(1)
    assert said == []


def test_every_watch_counts_for_itself(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    said: list[str] = []
    monkeypatch.setattr(Progress.__init__, "__defaults__", (clock,))
    first, second = (in_lines(said.append)(name, 10) for name in ("a", "b"))
    first(5)
    clock.now += 3
    second(1)
    unwatched("c", 1)(1)
    assert [line.split(" of ")[0] for line in said] == ["b: 1 B"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (999.7, "1.0 kB"), (1000, "1.0 kB"),
     (999_900, "999.9 kB"), (999_960, "1.0 MB"), (1_500_000, "1.5 MB"), (2_000_000_000, "2.0 GB"),
     (3.2e12, "3.2 TB"), (5e15, "5000.0 TB")],
)  # fmt: skip
def test_bytes_are_said_as_people_say_them(count: float | None, text: str) -> None:
    assert human_bytes(count) == text
