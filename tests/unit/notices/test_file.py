"""Word through a file or a FIFO."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from elastic_ckpt.notices.file import FileSource
from elastic_ckpt.policy.deadline import EarlyWarning, Notice


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notice"


def events(source: FileSource) -> list:
    return [event for _, event in source.poll()]


@pytest.mark.parametrize(
    ("text", "seconds", "reason"),
    [
        ("", 30, None),
        ("\n", 30, None),
        ("120\n", 120, None),
        ("45.5 the rack is moved\nmore\n", 45.5, "the rack is moved"),
        ("2m the rack is moved\n", 120, "the rack is moved"),
        ("the rack is moved\n", 30, "the rack is moved"),
        ("-5 soon\n", 30, "-5 soon"),
        ("nan\n", 30, "nan"),
        ("1e99 soon\n", 30, "1e99 soon"),
        ("10 \x1b[31mred\n", 10, r"\x1b[31mred"),
    ],
)
def test_the_first_line_has_seconds_and_reason(path, text, seconds, reason) -> None:
    source = FileSource(path, 30.0)
    assert events(source) == []
    path.write_text(text)
    os.utime(path, (time.time() - 1, time.time() - 1))
    [event] = events(source)
    assert isinstance(event, Notice)
    assert event.deadline - time.monotonic() == pytest.approx(seconds, abs=2)
    assert event.reason == (reason or str(path))


def test_a_warning_is_not_a_notice(path: Path) -> None:
    path.write_text("warning a storm comes\n")
    assert events(FileSource(path, 30.0)) == [EarlyWarning("file", "a storm comes")]


def test_seconds_count_from_the_time_of_writing(path: Path) -> None:
    path.write_text("100\n")
    os.utime(path, (time.time() - 60, time.time() - 60))
    [event] = events(FileSource(path, 30.0))
    assert event.deadline - time.monotonic() == pytest.approx(40, abs=2)


@pytest.mark.parametrize("text", ["100\n", "warning of a storm\n"])
def test_an_old_file_is_ignored(path: Path, text: str) -> None:
    path.write_text(text)
    os.utime(path, (time.time() - 86400, time.time() - 86400))
    assert events(FileSource(path, 30.0)) == []


def test_a_file_has_one_key_until_it_is_rewritten(path: Path) -> None:
    source = FileSource(path, 30.0)
    path.write_text("100\n")
    [(first, _)] = source.poll()
    [(again, _)] = source.poll()
    os.utime(path, ns=(0, time.time_ns() + 10**9))
    [(later, _)] = source.poll()
    assert first == again != later


def test_each_line_through_a_fifo_is_an_event_and_reading_does_not_block(path: Path) -> None:
    os.mkfifo(path)
    source = FileSource(path, 30.0)
    assert events(source) == []
    path.write_text("20 first\n")
    path.write_text("10 second\nwarning third\n")
    first, second, third = events(source)
    assert (first.reason, second.reason) == ("first", "second")
    assert third == EarlyWarning("file", "third")
    assert events(source) == []


def test_a_directory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a file nor a FIFO"):
        events(FileSource(tmp_path, 30.0))


def test_zero_seconds_is_a_notice(path: Path) -> None:
    source = FileSource(path, 30.0)
    path.write_text("0 the power fails\n")
    os.utime(path, (time.time() + 0.1, time.time() + 0.1))
    [event] = events(source)
    assert event.reason == "the power fails"


def test_a_slow_writer_has_time_to_write(path: Path) -> None:
    source = FileSource(path, 30.0)
    path.touch()
    assert events(source) == []
    path.write_text("warning of a storm\n")
    assert events(source) == [EarlyWarning("file", "of a storm")]


def test_a_fifo_that_replaces_another_is_read(path: Path) -> None:
    source = FileSource(path, 30.0)
    os.mkfifo(path)
    assert events(source) == []
    keep = path.with_name("keep")
    path.rename(keep)  # or the next one may get its inode
    os.mkfifo(path)
    assert events(source) == []
    path.write_text("10 again\n")
    assert [event.reason for event in events(source)] == ["again"]
