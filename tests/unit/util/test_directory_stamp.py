"""The stamp of a directory, by both ways to get it."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_ckpt.util import directory_stamp
from elastic_ckpt.util.directory_stamp import Stamp, stamp_of


@pytest.fixture(params=["statx", "open"])
def stamp(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], Stamp]:
    if request.param == "open":
        monkeypatch.setattr(directory_stamp, "stamp_of", directory_stamp._opened)
    return lambda directory: directory_stamp.stamp_of(directory)


def test_stamp_changes_with_the_names(tmp_path: Path, stamp: Callable[[Path], Stamp]) -> None:
    seen = []
    for change in (
        lambda: None,
        (tmp_path / "a").touch,
        lambda: (tmp_path / "a").rename(tmp_path / "b"),
        (tmp_path / "b").unlink,
    ):
        os.utime(tmp_path, ns=(0, 0))  # whatever the clock of the file system
        before = stamp(tmp_path)
        change()
        seen.append(stamp(tmp_path) != before)
    assert seen == [False, True, True, True]


def test_stamp_stays_when_a_file_is_written_to(
    tmp_path: Path, stamp: Callable[[Path], Stamp]
) -> None:
    (tmp_path / "a").touch()
    before = stamp(tmp_path)
    (tmp_path / "a").write_text("more")
    assert stamp(tmp_path) == before


def test_another_directory_has_another_stamp(
    tmp_path: Path, stamp: Callable[[Path], Stamp]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert stamp(tmp_path / "a") != stamp(tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        stamp(tmp_path / "missing")


def test_fields_are_those_of_stat(tmp_path: Path) -> None:
    found = os.stat(tmp_path)
    mode, inode, size, ctime, ctime_ns, mtime, mtime_ns, major, minor, mount = stamp_of(tmp_path)
    assert (mode, inode, size) == (found.st_mode, found.st_ino, found.st_size)
    assert ctime * 10**9 + ctime_ns == found.st_ctime_ns
    assert mtime * 10**9 + mtime_ns == found.st_mtime_ns
    assert os.makedev(major, minor) == found.st_dev
    assert mount >= 0


@pytest.mark.parametrize("why", ["old C library", "forbidden"])
def test_host_without_statx_opens_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    class Library:
        if why == "forbidden":

            def statx(self, *arguments: object) -> int:
                ctypes.set_errno(errno.EPERM)
                return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **more: Library())
    assert stamp_of(tmp_path)[1] == os.stat(tmp_path).st_ino
