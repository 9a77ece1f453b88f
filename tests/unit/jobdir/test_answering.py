"""A directory whose storage does not answer is reported within a bound."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from elastic_ckpt.errors import DirectoryUnusable, ExitCode, StopAborted
from elastic_ckpt.jobdir import answering
from elastic_ckpt.jobdir.answering import require_answer, wait_for_answer


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file; while it exists, the storage does not answer."""
    switch = tmp_path / "hangs"
    switch.touch()

    def touch(directory: Path) -> None:
        while switch.exists():
            time.sleep(0.01)

    monkeypatch.setattr(answering, "_touch", touch)
    monkeypatch.setattr(answering, "_TRY_SECONDS", 0.1)
    return switch


def test_a_missing_directory_answers(tmp_path: Path) -> None:
    require_answer(tmp_path / "missing")


def test_a_command_is_told_which_directory_hangs(hangs: Path, tmp_path: Path) -> None:
    with pytest.raises(DirectoryUnusable, match="has not answered for") as caught:
        require_answer(tmp_path, 0.1)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE


def test_a_start_says_once_that_it_waits_and_continues(hangs: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        hangs.unlink(missing_ok=True)

    wait_for_answer(tmp_path, say, lambda: False)
    assert said[0].startswith(f"{tmp_path} does not answer: waiting up to ")
    assert said[1:] == [f"{tmp_path} answers"]


def test_a_start_on_storage_that_answers_says_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    wait_for_answer(tmp_path, said.append, lambda: True)
    assert said == []


def test_a_signal_ends_the_wait(hangs: Path, tmp_path: Path) -> None:
    with pytest.raises(StopAborted, match="nothing was started"):
        wait_for_answer(tmp_path, lambda _: None, lambda: True)


def test_the_wait_of_a_start_is_bounded(
    hangs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "START_SECONDS", 0.0)
    with pytest.raises(DirectoryUnusable, match="has not answered"):
        wait_for_answer(tmp_path, lambda _: None, lambda: False)
