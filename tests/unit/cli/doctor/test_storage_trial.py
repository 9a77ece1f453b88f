"""The storage trial on good storage, and on storage that refuses, misbehaves or is slow."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from elastic_ckpt.checkpoint.disk import hashed_file as hashing
from elastic_ckpt.cli.doctor import storage_trial as trial
from elastic_ckpt.cli.doctor.storage_trial import (
    CHUNK_BYTES,
    PREFIX,
    TRIALS,
    ClockSkew,
    TrialDirectory,
    TrialEvent,
    TrialResult,
    WriteProgress,
    WriteSpeed,
    try_storage,
)

pytestmark = pytest.mark.one_torch


def tried(place: Path, chunks: int = 0, seconds: float = 5.0) -> list[TrialEvent]:
    found = list(try_storage(place, chunks * CHUNK_BYTES, seconds))
    assert list(place.iterdir()) == []
    return found


def outcome(place: Path, what: str) -> TrialResult:
    return next(
        word for word in tried(place) if isinstance(word, TrialResult) and word.what == what
    )


def refuse(number: int) -> Callable[..., NoReturn]:
    def call(*arguments: Any, **named: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


def test_a_good_storage_passes(tmp_path: Path) -> None:
    found = tried(tmp_path, chunks=5)
    assert isinstance(found[0], TrialDirectory) and Path(found[0].path).name.startswith(PREFIX)
    assert [word for word in found if isinstance(word, TrialResult)] == [
        TrialResult(what) for what in TRIALS
    ]
    assert [abs(word.seconds) < 5 for word in found if isinstance(word, ClockSkew)] == [True]
    last = [word for word in found if isinstance(word, WriteSpeed)][-1]
    assert last.bytes <= 5 * CHUNK_BYTES and 0 < last.least_seconds <= last.seconds


def test_an_abandoned_trial_leaves_nothing(tmp_path: Path) -> None:
    words = try_storage(tmp_path, 8 * CHUNK_BYTES, 5.0)
    for word in words:
        if isinstance(word, WriteProgress):
            break
    written = next(tmp_path.glob(f"{PREFIX}*/written"))
    assert written.stat().st_size >= CHUNK_BYTES
    assert written.parent.stat().st_mode & 0o777 == 0o700
    words.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", refuse(errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        tried(tmp_path)


@pytest.mark.parametrize(
    ("what", "call", "number"),
    [
        ("fsync", "fsync", errno.EINVAL),
        ("rename", "replace", errno.ENOSYS),
        ("rename", "rename", errno.EXDEV),
        ("locks", "flock", errno.ENOLCK),
    ],
)
def test_a_refused_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, call: str, number: int
) -> None:
    module = fcntl if call == "flock" else os
    monkeypatch.setattr(module, call, refuse(number))
    assert outcome(tmp_path, what) == TrialResult(what, os.strerror(number), number)


def test_a_storage_that_cannot_sync_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "sync_directory", refuse(errno.EINVAL))
    assert outcome(tmp_path, "fsync").errno == errno.EINVAL


def replace_by_copy(source: Path, target: Path) -> None:
    """Rename by copying, and stop before deleting the old name."""
    Path(target).write_bytes(Path(source).read_bytes())


def move_into(source: Path, target: Path) -> None:
    """Replace a directory that is not empty."""
    real_rename(source, target / "moved" if target.exists() else target)


real_open, real_rename, real_mkdir = os.open, os.rename, os.mkdir


def open_anything(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
    return real_open(path, flags & ~(os.O_EXCL | os.O_NOFOLLOW), *arguments, **named)


def open_to_all(path: Any, flags: int, mode: int = 0o777, **named: Any) -> int:
    fd = real_open(path, flags, mode, **named)
    if flags & os.O_CREAT:
        os.fchmod(fd, 0o755)
    return fd


def make_again(path: Any, mode: int = 0o777) -> None:
    if not Path(path).is_dir():
        real_mkdir(path, mode)


@pytest.mark.parametrize(
    ("what", "call", "lie", "why"),
    [
        ("rename", "replace", replace_by_copy, "did not replace the target"),
        ("rename", "rename", move_into, "replaced one that is not empty"),
        ("O_EXCL", "open", open_anything, "created a file that already exists"),
        ("O_EXCL", "mkdir", make_again, "created a directory that already exists"),
        ("O_NOFOLLOW", "open", open_anything, "followed a link"),
        ("locks", "flock", lambda *given: None, "two processes hold the same lock"),
        ("modes", "open", open_to_all, "gets mode 0755"),
    ],
)
def test_a_storage_with_wrong_results(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    call: str,
    lie: Callable[..., Any],
    why: str,
) -> None:
    monkeypatch.setattr(fcntl if call == "flock" else os, call, lie)
    found = outcome(tmp_path, what)
    assert why in found.why and found.errno == 0


def test_shared_locks_that_have_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that ignore shared locks of other processes."""
    real = fcntl.flock
    monkeypatch.setattr(
        fcntl, "flock", lambda fd, kind: None if kind & fcntl.LOCK_SH else real(fd, kind)
    )
    assert "an exclusive lock ignores" in outcome(tmp_path, "locks").why


def test_a_storage_without_links_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "symlink", refuse(errno.EPERM))
    assert outcome(tmp_path, "O_NOFOLLOW") == TrialResult("O_NOFOLLOW")


@pytest.mark.parametrize("ahead", [100.0, -100.0])
def test_clock_skew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    clock = SimpleNamespace(time=lambda: time.time() - ahead, monotonic=time.monotonic)
    monkeypatch.setattr(trial, "time", clock)
    (skew,) = [word for word in tried(tmp_path) if isinstance(word, ClockSkew)]
    assert skew.seconds == pytest.approx(ahead, abs=5)


class Slow:
    """A clock that only advances by writing, and a disk with a given time per chunk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
        self.now = 0.0
        self.written = 0
        real = hashing.HashedFile.write

        def write(file: hashing.HashedFile, data: Any) -> int:
            self.now += seconds(self.written)
            self.written += 1
            return real(file, data)

        monkeypatch.setattr(hashing.HashedFile, "write", write)
        clock = SimpleNamespace(time=time.time, monotonic=lambda: self.now)
        monkeypatch.setattr(trial, "time", clock)


def wrote(found: list[TrialEvent]) -> list[tuple[int, float]]:
    return [
        (word.bytes // CHUNK_BYTES, word.seconds) for word in found if isinstance(word, WriteSpeed)
    ]


def test_pieces_double_and_end_with_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow(monkeypatch, lambda written: 0.5)
    assert wrote(tried(tmp_path, chunks=64)) == [(1, 0.5), (3, 1.5), (7, 3.5), (10, 5.0)]


def test_a_disk_that_becomes_slow_ends_the_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow(monkeypatch, lambda written: 0.1 if written < 7 else 3.0)
    assert [chunks for chunks, _ in wrote(tried(tmp_path, chunks=64))] == [1, 3, 7, 9]


def test_one_chunk_may_take_all_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow(monkeypatch, lambda written: 30.0)
    assert wrote(tried(tmp_path, chunks=64)) == [(1, 30.0)]


def test_the_bytes_written_are_bounded(tmp_path: Path) -> None:
    assert sum(chunks for chunks, _ in wrote(tried(tmp_path, chunks=1))) == 1
    assert not any(isinstance(word, WriteProgress) for word in tried(tmp_path, chunks=0))


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing.HashedFile, "write", refuse(errno.ENOSPC))
    assert tried(tmp_path, chunks=2)[-1] == TrialResult("writing", "No space left on device", 28)
