"""Files of lines: rotation, torn lines, and a writer that neither raises nor waits for long."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from elastic_ckpt.util.jsonl import AppendedFile, LineWriter, older

pytestmark = pytest.mark.one_torch


def file_of(
    path: Path, *, limit: int | None = None, rotations: int = 1, keeps_open: bool = False
) -> AppendedFile:
    return AppendedFile(path, lambda: None, limit=limit, rotations=rotations, keeps_open=keeps_open)


def writer_of(path: Path, *, wait_seconds: float = 20.0, max_waiting: int = 100) -> LineWriter:
    return LineWriter(
        "tested", file_of(path), wait_seconds=wait_seconds, max_waiting=max_waiting,
        report=lambda lost: b"lost %d\n" % lost,
    )  # fmt: skip


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that hangs while the event is clear; it is set at first."""
    answers, write = threading.Event(), os.write
    answers.set()

    def hang(fd: int, data: bytes) -> int:
        assert b"line" not in data or answers.wait(60)
        return write(fd, data)

    monkeypatch.setattr(os, "write", hang)
    return answers


@pytest.mark.parametrize("rotations", [1, 3])
def test_long_file_is_rotated(tmp_path: Path, rotations: int) -> None:
    file = file_of(tmp_path / "a", limit=100, rotations=rotations, keeps_open=True)
    for number in range(100):
        file.append(b"line %d\n" % number, is_line=True)
    file.close()
    names = [older(tmp_path / "a", number) for number in range(rotations, -1, -1)]
    assert sorted(tmp_path.iterdir()) == sorted(names)
    assert all(path.stat().st_size < 110 for path in names)
    lines = b"".join(path.read_bytes() for path in names).splitlines()
    assert lines == [b"line %d" % number for number in range(100 - len(lines), 100)]


def test_file_that_another_process_rotates_is_followed(tmp_path: Path) -> None:
    mine, other = file_of(tmp_path / "a"), file_of(tmp_path / "a", limit=10)
    for number in range(4):
        mine.append(b"mine %d\n" % number, is_line=True)
        other.append(b"other %d\n" % number, is_line=True)
    other.close()
    assert (tmp_path / "a").read_bytes() == b"other 3\n"
    assert (tmp_path / "a.1").read_bytes() == b"other 2\nmine 3\n"


def test_line_after_a_torn_one_starts_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(tmp_path / "a", keeps_open=True)
    file.append(b"first\n", is_line=True)
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        with pytest.raises(OSError, match="No space left"):
            file.append(b"second\n", is_line=True)
    file.append(b"third\n", is_line=True)
    file.close()
    assert (tmp_path / "a").read_bytes() == b"first\nsec\nthird\n"


def test_refused_file_is_not_written(tmp_path: Path) -> None:
    def refuse() -> None:
        raise PermissionError("not ours")

    file = AppendedFile(tmp_path / "a", refuse, limit=None, rotations=1, keeps_open=False)
    with pytest.raises(PermissionError):
        file.append(b"x")
    assert list(tmp_path.iterdir()) == []


def test_waiting_writer_returns_when_the_line_is_written(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "a")
    writer.put(b"line\n", wait=True)
    assert (tmp_path / "a").read_bytes() == b"line\n"
    writer.close(20)


def test_only_the_first_line_waits_for_a_disk_that_hangs(
    tmp_path: Path, disk: threading.Event
) -> None:
    disk.clear()
    writer = writer_of(tmp_path / "a", wait_seconds=0.5)
    started = time.monotonic()
    for _ in range(50):
        writer.put(b"line\n", wait=True)
    took = time.monotonic() - started
    disk.set()
    writer.close(20)
    assert 0.5 <= took < 10  # it would be 25
    assert (tmp_path / "a").read_bytes() == b"line\n" * 50


def test_writer_waits_again_once_the_disk_has_caught_up(
    tmp_path: Path, disk: threading.Event
) -> None:
    path, limit = tmp_path / "a", time.monotonic() + 20
    writer = writer_of(path, wait_seconds=0.2)
    waited = put = 0
    while waited < 2:
        assert time.monotonic() < limit
        disk.clear()
        started = time.monotonic()
        writer.put(b"line\n", wait=True)
        put, waited = put + 1, waited + (time.monotonic() - started >= 0.2)
        disk.set()
        while not path.exists() or path.read_bytes().count(b"line") < put:
            assert time.monotonic() < limit
            time.sleep(0.005)
    writer.close(20)


def test_lines_beyond_the_queue_are_counted_and_reported(
    tmp_path: Path, disk: threading.Event
) -> None:
    disk.clear()
    writer = writer_of(tmp_path / "a", max_waiting=10)
    for _ in range(30):
        writer.put(b"line\n")
    disk.set()
    writer.close(20)
    lines = (tmp_path / "a").read_bytes().splitlines()
    lost = sum(int(line.split()[1]) for line in lines if line.startswith(b"lost"))
    assert lost in (19, 20)  # one line may be out of the queue
    assert lines.count(b"line") == 30 - lost


@pytest.mark.parametrize(("wait_seconds", "written"), [(1.0, True), (0.0, False)])
def test_without_a_thread_only_a_writer_that_may_wait_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_seconds: float, written: bool
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        writer = writer_of(tmp_path / "a", wait_seconds=wait_seconds)
        writer.put(b"line\n")
    assert (tmp_path / "a").exists() is written
