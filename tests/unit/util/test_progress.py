"""Progress lines: long work shows them, short work does not, and every number is finite."""

from __future__ import annotations

import pytest

from elastic_ckpt.util.progress import Progress, in_lines, unwatched


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_short_work_shows_nothing(clock: Clock) -> None:
    shown: list[str] = []
    progress = Progress("verifying x", 100, shown.append, clock)
    for _ in range(100):
        clock.now += 0.0199
        progress.advance(1)
    assert shown == []


def test_long_work_shows_a_line_every_two_seconds(clock: Clock) -> None:
    shown: list[str] = []
    progress = Progress("verifying x", 10_000_000_000, shown.append, clock)
    for _ in range(52):
        clock.now += 0.125
        progress.advance(125_000_000)
    assert shown == [
        "verifying x: 20 %, 2.0 GB of 10.0 GB, 1.0 GB/s, 8 s left",
        "verifying x: 40 %, 4.0 GB of 10.0 GB, 1.0 GB/s, 6 s left",
        "verifying x: 60 %, 6.0 GB of 10.0 GB, 1.0 GB/s, 4 s left",
    ]


@pytest.mark.parametrize(
    ("total", "done", "seconds"),
    [(0, 0, 0.0), (0, 0, 5.0), (0, 10, 5.0), (100, 0, 5.0), (100, 500, 5.0), (100, 100, 0.0),
     (10**18, 1, 1e-12)],
)  # fmt: skip
def test_every_number_is_finite(clock: Clock, total: int, done: int, seconds: float) -> None:
    """Covers empty work, no progress yet, more done than the total, and no time passed."""
    progress = Progress("x", total, lambda _: None, clock)
    clock.now += seconds
    progress.advance(done)
    line = progress.line(clock.now)
    assert line.startswith("x: ") and line.endswith(" s left")
    assert "-" not in line and "nan" not in line and "inf" not in line


def test_a_stopped_clock_shows_nothing(clock: Clock) -> None:
    shown: list[str] = []
    progress = Progress("x", 10, shown.append, clock)
    for _ in range(10):
        progress.advance(1)
    assert shown == []


def test_watches_count_separately(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown: list[str] = []
    monkeypatch.setattr(Progress.__init__, "__defaults__", (clock,))
    first, second = (in_lines(shown.append)(name, 10) for name in ("a", "b"))
    first(5)
    clock.now += 3
    second(1)
    unwatched("c", 1)(1)
    assert [line.split(" of ")[0] for line in shown] == ["b: 10 %, 1 Byte"]
