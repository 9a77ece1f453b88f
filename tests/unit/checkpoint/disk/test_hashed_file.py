"""What is hashed on the way to the disk, and in a pass of its own, is what lies there."""

from __future__ import annotations

import errno
import os
import threading
from array import array
from pathlib import Path

import numpy as np
import pytest
import xxhash

from elastic_ckpt.checkpoint.disk import hashed_file as hashing
from elastic_ckpt.checkpoint.disk.hashed_file import BLOCK_BYTES, HashedFile, hash_file

SIZES = [0, 1, 7, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES,
         2 * BLOCK_BYTES + 3]  # fmt: skip


def some_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def written(path: Path, *chunks: object) -> tuple[int, str]:
    """Write all chunks; what the entry says of them."""
    file = HashedFile(path)
    try:
        for chunk in chunks:
            file.write(chunk)
        return file.finish()[:2]
    finally:
        file.close()


@pytest.mark.parametrize("size", SIZES)
def test_the_digest_is_that_of_the_bytes_in_both_ways(tmp_path: Path, size: int) -> None:
    data = some_bytes(size)
    expected = (size, xxhash.xxh3_128_hexdigest(data))
    path = tmp_path / "file"
    assert written(path, data) == expected
    assert path.read_bytes() == data
    told: list[int] = []
    assert hash_file(path, told.append) == expected
    assert sum(told) == size


def test_many_small_writes_and_large_ones_between_make_one_digest(tmp_path: Path) -> None:
    """The helper thread and the direct way keep their order."""
    sizes = np.random.default_rng(1)
    chunks = [some_bytes(int(size)) for size in sizes.integers(0, 900, 400)]
    chunks[100:100] = [some_bytes(BLOCK_BYTES)]
    chunks[200:200] = [some_bytes(BLOCK_BYTES + 5), some_bytes(BLOCK_BYTES)]
    data = b"".join(chunks)
    path = tmp_path / "file"
    assert written(path, *chunks) == (len(data), xxhash.xxh3_128_hexdigest(data))
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "buffer",
    [b"abc", bytearray(b"abc"), memoryview(b"abc"), array("d", [1.0, 2.0]), np.arange(5),
     np.ones((3, 4)), np.float32(2.0), b"", np.arange(12)[4:8]],
    ids=lambda buffer: type(buffer).__name__,
)  # fmt: skip
def test_anything_with_a_contiguous_buffer_is_written(tmp_path: Path, buffer: object) -> None:
    data = memoryview(buffer).tobytes()  # type: ignore[arg-type]
    assert written(tmp_path / "file", buffer) == (len(data), xxhash.xxh3_128_hexdigest(data))
    assert (tmp_path / "file").read_bytes() == data


def test_a_buffer_with_gaps_is_refused_and_not_torn(tmp_path: Path) -> None:
    file = HashedFile(tmp_path / "file")
    with pytest.raises(TypeError):
        file.write(np.arange(10)[::2])
    file.close()
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("size", [1000, BLOCK_BYTES + 1])
def test_short_write_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """As near a full disk, at the end of a quota, or on a signal."""
    data = some_bytes(size)
    write = os.write
    calls: list[int] = []

    def short(fd: int, chunk: memoryview) -> int:
        calls.append(len(chunk))
        return write(fd, chunk[: max(1, len(chunk) // 2 + 1)])

    monkeypatch.setattr(os, "write", short)
    found = written(tmp_path / "file", data)
    monkeypatch.undo()
    assert len(calls) > 5
    assert found == (size, xxhash.xxh3_128_hexdigest(data))
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("size", [1000, BLOCK_BYTES, 2 * BLOCK_BYTES])
def test_an_error_while_it_writes_is_raised_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Not every caller lets it through, so the file remembers it."""

    def full(fd: int, chunk: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    file = HashedFile(tmp_path / "file")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as refusal:
        file.write(some_bytes(size))
    assert file.error is refusal.value
    file.close()


def test_no_thread_or_descriptor_leaks(tmp_path: Path) -> None:
    threads, open_before = threading.active_count(), set(os.listdir("/proc/self/fd"))
    data = some_bytes(2 * BLOCK_BYTES)
    for name in ("one", "two"):
        written(tmp_path / name, data)
        hash_file(tmp_path / name)
    with pytest.raises(ZeroDivisionError):
        hash_file(tmp_path / "one", lambda _: 1 // 0)
    assert threading.active_count() == threads
    assert set(os.listdir("/proc/self/fd")) == open_before


def test_a_file_that_grows_while_it_is_hashed_is_hashed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then its size tells that it is not what was listed."""
    path = tmp_path / "file"
    path.write_bytes(b"ab")
    grown = False

    def grow(count: int) -> None:
        nonlocal grown
        if not grown:
            grown = True
            with path.open("ab") as file:
                file.write(b"cdef")

    assert hash_file(path, grow) == (6, xxhash.xxh3_128_hexdigest(b"abcdef"))


def test_short_reads_do_not_shift_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the kernel gives at once."""
    data = some_bytes(3 * BLOCK_BYTES + 17)
    path = tmp_path / "file"
    path.write_bytes(data)
    readv = os.readv
    turns = iter([10, 3_000_000, 1, 2_000_000] * 100)
    monkeypatch.setattr(os, "readv", lambda fd, buffers: readv(fd, [buffers[0][: next(turns)]]))
    assert hash_file(path) == (len(data), xxhash.xxh3_128_hexdigest(data))


def test_the_size_of_a_chunk_does_not_change_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every split of a file into chunks, with a chunk so small that all paths are taken."""
    monkeypatch.setattr(hashing, "BLOCK_BYTES", 8)
    for size in range(30):
        data = some_bytes(size)
        path = tmp_path / str(size)
        expected = (size, xxhash.xxh3_128_hexdigest(data))
        assert written(path, data) == expected
        assert hash_file(path) == expected
        for cut in range(0, size, 5):
            assert written(tmp_path / f"{size}-{cut}", data[:cut], data[cut:]) == expected
