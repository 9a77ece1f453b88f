"""Is there room for a save?"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic_ckpt.checkpoint.disk.space import RESERVE_BYTES, ensure_space, free_bytes
from elastic_ckpt.errors import SaveFailed, StorageFailed


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk that says what the test wants; blocks of 4096 bytes."""
    said = SimpleNamespace(f_bavail=0, f_frsize=4096, f_bfree=10**9, f_blocks=10**9)
    monkeypatch.setattr(os, "statvfs", lambda directory: said)
    return said


def test_what_fits_needs_no_room(disk: SimpleNamespace, tmp_path: Path) -> None:
    """To the byte, with the reserve."""
    asked: list[int] = []
    disk.f_bavail = 1000 + RESERVE_BYTES // 4096
    ensure_space(tmp_path, 1000 * 4096, lambda: asked.append(1))
    assert asked == []
    with pytest.raises(StorageFailed):
        ensure_space(tmp_path, 1000 * 4096 + 1, lambda: asked.append(1))
    assert asked == [1]


def test_what_root_alone_may_use_is_not_free(disk: SimpleNamespace, tmp_path: Path) -> None:
    disk.f_bavail = 3
    assert free_bytes(tmp_path) == 3 * 4096


def test_room_is_made_where_there_is_too_little(disk: SimpleNamespace, tmp_path: Path) -> None:
    def make_room() -> None:
        asked.append(1)
        disk.f_bavail = 10_000

    asked: list[int] = []
    ensure_space(tmp_path, 5_000_000, make_room)
    assert asked == [1]


def test_too_little_space_is_an_error_with_advice(disk: SimpleNamespace, tmp_path: Path) -> None:
    asked: list[int] = []
    disk.f_bavail = 1000
    with pytest.raises(StorageFailed) as refusal:
        ensure_space(tmp_path, 50_000_000_000, lambda: asked.append(1))
    assert asked == [1]
    message = str(refusal.value)
    assert "50.0 GB" in message and "4.1 MB free" in message and str(tmp_path) in message
    assert "--keep-last" in message
    assert isinstance(refusal.value, SaveFailed)


def test_a_file_system_that_does_not_say_is_not_full(disk: SimpleNamespace, tmp_path: Path) -> None:
    """Some user-space and network file systems report no blocks at all."""
    asked: list[int] = []
    disk.f_blocks = disk.f_bfree = disk.f_bavail = 0
    ensure_space(tmp_path, 10**15, lambda: asked.append(1))
    assert asked == []


def test_a_real_disk_has_a_number(tmp_path: Path) -> None:
    assert 0 < free_bytes(tmp_path) <= os.statvfs(tmp_path).f_bfree * 10**6
