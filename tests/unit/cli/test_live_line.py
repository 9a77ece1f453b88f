"""A terminal's line while a command waits; nothing elsewhere, and nothing for short waits."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic_ckpt.cli.progress import live_line
from elastic_ckpt.cli.progress.live_line import LiveLine
from elastic_ckpt.cli.run.import_wait import (
    ImportStage,
    ImportWait,
    remember_seconds,
    usual_seconds,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> list[str]:
        return self.getvalue().split("\r\x1b[K")[1:]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    monkeypatch.setattr(live_line, "sys", SimpleNamespace(stderr=found))
    monkeypatch.setenv("COLUMNS", "80")
    return found


def test_nothing_without_a_terminal(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    found = io.StringIO()
    monkeypatch.setattr(live_line, "sys", SimpleNamespace(stderr=found))
    line = LiveLine("x", clock)
    clock.now += 60
    line.show(1, 2)
    line.wait(None)
    line.clear()
    assert found.getvalue() == ""


def test_nothing_for_two_seconds(terminal: Terminal, clock: Clock) -> None:
    line = LiveLine("x", clock)
    clock.now += 1.9
    line.show(1, 2)
    line.clear()
    assert terminal.getvalue() == ""


def test_progress_has_a_percentage_and_the_time_left(terminal: Terminal, clock: Clock) -> None:
    line = LiveLine("replay", clock)
    for done in (0, 2, 5, 10):
        clock.now += 10
        line.show(done, 10)
    line.clear()
    assert terminal.shown == [
        "replay: 0 %", "replay: 20 %, 80 s left", "replay: 50 %, 30 s left", "replay: 99 %", "",
    ]  # fmt: skip


def test_a_wait_has_the_time_left_until_it_is_longer(terminal: Terminal, clock: Clock) -> None:
    line = LiveLine("waiting", clock)
    for _ in range(3):
        clock.now += 5
        line.wait(12.0, 300.0)
    clock.now += 5
    line.wait(None)
    assert terminal.shown == [
        "waiting: 41 %, 7 s left", "waiting: 83 %, 2 s left",
        "waiting: 15 s (usually 12 s), up to 5 min", "waiting: 20 s",
    ]  # fmt: skip


def test_the_line_fits_the_terminal(
    terminal: Terminal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    line = LiveLine("a name that is too long", clock)
    clock.now += 5
    line.show(1, 2)
    assert [len(one) for one in terminal.shown] == [19]


def test_the_time_of_an_import_is_kept_for_the_next(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stages = iter([ImportStage.YET_TO_BEGIN, ImportStage.IMPORTING, ImportStage.OVER])
    wait = ImportWait(["torch", "colossalai", "colossalai.booster"])
    wait.begin(lambda: next(stages))
    assert wait._thread is not None
    wait._thread.join(30)
    wait.end()
    seconds = usual_seconds("torch,colossalai")
    assert seconds is not None and 0 < seconds < 30
    assert usual_seconds("torch") is None
    remember_seconds("torch", 3.0)
    assert usual_seconds("torch") == 3.0 and usual_seconds("torch,colossalai") == seconds


@pytest.mark.parametrize("content", [b"", b"[]", b'{"torch": "x"}', b"\xff"])
def test_a_damaged_cache_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "elastic-ckpt").mkdir()
    (tmp_path / "elastic-ckpt" / "import-seconds.json").write_bytes(content)
    assert usual_seconds("torch") is None
    remember_seconds("torch", 3.0)
    assert usual_seconds("torch") == 3.0


def test_a_run_that_ends_first_ends_the_wait(terminal: Terminal) -> None:
    wait = ImportWait([])
    wait.end()  # before it began
    wait = ImportWait([])
    wait.begin(lambda: ImportStage.IMPORTING)
    wait.end()
    assert wait._thread is not None and not wait._thread.is_alive()
