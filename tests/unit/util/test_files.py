"""Durable file primitives."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import xxhash

from elastic_ckpt.checkpoint.disk.hashed_file import hash_file
from elastic_ckpt.util import files
from elastic_ckpt.util.files import files_below, write_atomic, write_record


def test_an_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    """Shorter contents leave nothing of the longer ones, and no temporary file."""
    path = tmp_path / "record"
    write_atomic(path, b"long contents")
    write_atomic(path, b"short")
    assert path.read_bytes() == b"short"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """A full disk is an error to the caller and changes nothing."""
    path = tmp_path / "record"
    write_atomic(path, b"old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_atomic_write_is_durable_in_contents_and_in_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contents are synced before the name changes, the directory after it."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(fd: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    def record_replace(source: Path, target: Path) -> None:
        done.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomic(tmp_path / "record", b"data")
    first, second, third = done
    assert Path(first).name == ".tmp-record"
    assert (second, third) == ("replace", str(tmp_path))


@pytest.mark.parametrize("size", [0, 1, 4 * 1024 * 1024, 4 * 1024 * 1024 + 1])
def test_the_hash_is_that_of_the_whole_file(tmp_path: Path, size: int) -> None:
    """At, below and above the size of one read."""
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    path = tmp_path / "file"
    path.write_bytes(data)
    assert hash_file(path) == (size, xxhash.xxh3_128_hexdigest(data))


def test_a_link_is_not_hashed(tmp_path: Path) -> None:
    """It is refused, wherever it leads."""
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError):
        hash_file(tmp_path / "link")


def test_links_are_listed_and_not_followed(tmp_path: Path) -> None:
    """Files, and links to files and to directories, at the top and below."""
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "secret").write_bytes(b"")
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "top").write_bytes(b"")
    (root / "a" / "b" / "file").write_bytes(b"")
    (root / "link").symlink_to(outside)
    (root / "a" / "link").symlink_to(outside / "secret")
    (root / "a" / "b" / "loop").symlink_to(root)
    assert files_below(root) == ["a/b/file", "a/b/loop", "a/link", "link", "top"]


def test_record_is_overwritten_where_a_full_disk_takes_no_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record"
    write_record(path, b"a longer one")

    def refuse(path: Path, *, shared: bool | None = None) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files, "create_file", refuse)
    write_record(path, b"short")
    assert path.read_bytes() == b"short       "
    with pytest.raises(OSError, match="full"):
        write_record(path, bytes(1024 * 1024))
    assert path.read_bytes() == b"short       "
