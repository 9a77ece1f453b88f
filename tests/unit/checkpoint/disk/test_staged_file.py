"""What is collected into pages and written past the page cache is what was given."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import xxhash

from elastic_ckpt.checkpoint.disk import hashed_file as hashing
from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.hashed_file import (
    LARGE_BYTES,
    STAGE_BYTES,
    HashedFile,
    StagedFile,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import open_job

SIZES = [LARGE_BYTES, LARGE_BYTES + 1, 3 * STAGE_BYTES - 1, 3 * STAGE_BYTES, 5 * STAGE_BYTES + 4097]


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def pieces(data: bytes, seed: int) -> list[bytes]:
    """Of all lengths: a few bytes, and more than a buffer takes."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(data) + 1, 12))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize("size", SIZES)
def test_any_pieces_make_the_same_file_and_digest(job: JobDirectory, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    attempt = DiskAttempt.begin(job, 1)
    part = attempt.part(0)
    with part.open("modeling/0", size) as file:
        assert isinstance(file, StagedFile)
        for piece in pieces(data, size):
            assert file.write(piece) == len(piece)
    entry = next(one for one in part.finish(1, None) if one.path == "modeling/0")
    assert (entry.bytes, entry.xxh3_128) == (size, xxhash.xxh3_128_hexdigest(data))
    assert (attempt.path / "modeling/0").read_bytes() == data


def test_the_caller_may_reuse_its_buffer_at_once(job: JobDirectory) -> None:
    part = DiskAttempt.begin(job, 1).part(0)
    buffer = bytearray(STAGE_BYTES)
    expected = xxhash.xxh3_128()
    with part.open("state", 6 * STAGE_BYTES) as file:
        for number in range(6):
            buffer[:] = bytes([number]) * STAGE_BYTES
            expected.update(buffer)
            file.write(buffer)
            buffer[:] = bytes([255]) * STAGE_BYTES
    assert part.finish(1, None)[0].xxh3_128 == expected.hexdigest()


def test_less_than_was_announced_is_no_longer_than_it_was(job: JobDirectory) -> None:
    """The blocks are reserved beforehand: what was not written must not stand there as zeros."""
    attempt = DiskAttempt.begin(job, 1)
    part = attempt.part(0)
    with part.open("state", 4 * LARGE_BYTES) as file:
        file.write(b"x" * (LARGE_BYTES + 5))
    assert part.finish(1, None)[0].bytes == LARGE_BYTES + 5
    assert (attempt.path / "state").read_bytes() == b"x" * (LARGE_BYTES + 5)


def test_a_disk_that_fills_in_the_background_is_an_error_of_the_block(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: HashedFile, data: object) -> int:
        self.error = OSError(errno.ENOSPC, "full")
        raise self.error

    part = DiskAttempt.begin(job, 1).part(0)
    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(OSError, match="full"), part.open("state", 4 * STAGE_BYTES) as file:
        file.write(b"x" * STAGE_BYTES)
    assert part.paths == []


def test_a_file_system_without_direct_writes_takes_the_usual_way(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_write_directly", lambda fd, size: False)
    part = DiskAttempt.begin(job, 1).part(0)
    with part.open("state", LARGE_BYTES) as file:
        assert isinstance(file, HashedFile)
        file.write(b"x" * LARGE_BYTES)
    assert part.finish(1, None)[0].bytes == LARGE_BYTES
