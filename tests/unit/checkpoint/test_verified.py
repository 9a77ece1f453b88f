"""Which checkpoints were verified in full, once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint import verify as verified
from elastic_ckpt.checkpoint.verify import is_verified, mark_verified, read_manifest, unmark
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import make_checkpoint, open_job, tree


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def test_a_mark_is_of_one_checkpoint_alone(job: JobDirectory) -> None:
    one, two = make_checkpoint(job, 10), make_checkpoint(job, 20)
    manifest = read_manifest(one)
    assert not is_verified(job, one, manifest)
    mark_verified(job, one, manifest)
    mark_verified(job, one, manifest)
    assert is_verified(job, one, manifest)
    assert not is_verified(job, two, read_manifest(two))
    assert not is_verified(job, one, read_manifest(two))
    unmark(job, one)
    unmark(job, one)
    assert not is_verified(job, one, manifest)


@pytest.mark.parametrize("damage", [b"", b"x" * 1000, b"0123456789abcdef"])
def test_mark_with_other_content_does_not_count(job: JobDirectory, damage: bytes) -> None:
    path = make_checkpoint(job)
    mark_verified(job, path, read_manifest(path))
    (job.verified / path.name).write_bytes(damage)
    assert not is_verified(job, path, read_manifest(path))


def test_a_mark_that_is_a_link_is_none(job: JobDirectory, tmp_path: Path) -> None:
    path = make_checkpoint(job)
    (tmp_path / "elsewhere").write_bytes(read_manifest(path).attempt.encode())
    (job.verified / path.name).symlink_to(tmp_path / "elsewhere")
    assert not is_verified(job, path, read_manifest(path))


def test_refused_mark_is_not_an_error(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read again the next time."""
    path = make_checkpoint(job)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(verified, "write_atomic", full)
    mark_verified(job, path, read_manifest(path))
    assert not is_verified(job, path, read_manifest(path))


def test_a_directory_that_is_no_job_s_gets_nothing(job: JobDirectory, tmp_path: Path) -> None:
    """A copy of a checkpoint is verified where it lies."""
    path = make_checkpoint(job)
    elsewhere = JobDirectory(tmp_path / "copies")
    elsewhere.root.mkdir()
    copy = path.rename(elsewhere.root / path.name)
    before = tree(tmp_path)
    mark_verified(elsewhere, copy, read_manifest(copy))
    mark_verified(job, copy, read_manifest(copy))
    assert tree(tmp_path) == before
