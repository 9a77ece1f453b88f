"""The ranks' shares of a verification, and what changes between it and the load."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.manifest import FileEntry, Manifest
from elastic_ckpt.checkpoint.verify import Unchanged, read_manifest, share_out
from elastic_ckpt.errors import CheckpointRejected
from tests.checkpoints import MODEL, flip_bit, make_checkpoint, open_job, tick

MIB = 2**20


def entries(*sizes: int) -> list[FileEntry]:
    return [FileEntry(f"f{index}", size, "0" * 32, 0) for index, size in enumerate(sizes)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("seed", range(4))
def test_every_file_is_in_one_share_whatever_the_order(world_size: int, seed: int) -> None:
    """And every rank finds the same shares: the manifest's order does not matter."""
    dice = random.Random(seed)
    files = entries(*(dice.randrange(0, 2**30) for _ in range(dice.randrange(0, 40))))
    shares = [share_out(files, rank, world_size) for rank in range(world_size)]
    assert sorted(entry.path for share in shares for entry in share) == sorted(
        entry.path for entry in files
    )
    shuffled = dice.sample(files, len(files))
    assert [share_out(shuffled, rank, world_size) for rank in range(world_size)] == shares


def test_the_shares_are_about_equal() -> None:
    """No rank reads more than the mean and one file."""
    dice = random.Random(1)
    files = entries(*(dice.randrange(MIB, 64 * MIB) for _ in range(100)))
    total = sum(entry.bytes for entry in files)
    for world_size in (2, 5, 16):
        loads = [
            sum(entry.bytes for entry in share_out(files, rank, world_size))
            for rank in range(world_size)
        ]
        assert max(loads) <= total / world_size + 64 * MIB + MIB
        assert min(loads) > 0


def test_one_large_file_keeps_its_rank_from_the_small_ones() -> None:
    files = entries(100 * MIB, *[MIB] * 30)
    assert [entry.path for entry in share_out(files, 0, 2)] == ["f0"]
    assert len(share_out(files, 1, 2)) == 30


def test_empty_files_are_shared_too() -> None:
    """Opening one costs something."""
    files = entries(*[0] * 10)
    assert [len(share_out(files, rank, 5)) for rank in range(5)] == [2] * 5


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(open_job(tmp_path / "job"))


@pytest.fixture
def manifest(checkpoint: Path) -> Manifest:
    return read_manifest(checkpoint)


def test_untouched_files_are_not_read_again(
    checkpoint: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchanged, read = Unchanged(checkpoint, manifest.files), []
    monkeypatch.setattr(
        "elastic_ckpt.checkpoint.verify.hash_file", lambda *call, **_: read.append(call)
    )
    unchanged.check()
    assert read == []


def test_a_byte_that_changed_through_another_name_is_noticed(
    checkpoint: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """Even where the size and the time of change of the contents are what they were."""
    unchanged = Unchanged(checkpoint, manifest.files)
    before = (checkpoint / MODEL).stat()
    tick()
    os.link(checkpoint / MODEL, tmp_path / "other name")
    flip_bit(tmp_path / "other name")
    os.utime(tmp_path / "other name", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointRejected, match=f"changed while it was loaded: {MODEL}"):
        unchanged.check()


@pytest.mark.parametrize("what", ["replaced", "removed", "longer", "a link"])
def test_a_file_that_is_another_one_by_now_is_noticed(
    checkpoint: Path, manifest: Manifest, tmp_path: Path, what: str
) -> None:
    unchanged = Unchanged(checkpoint, manifest.files)
    path = checkpoint / MODEL
    data = path.read_bytes()
    tick()
    if what == "longer":
        with path.open("ab") as file:
            file.write(b"!")
    else:
        path.unlink()
    if what == "replaced":
        path.write_bytes(data[::-1])
    elif what == "a link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises((CheckpointRejected, OSError)):
        unchanged.check()


def test_a_backup_changes_nothing(checkpoint: Path, manifest: Manifest, tmp_path: Path) -> None:
    """New times, new modes, new links (cp -al): the bytes are what counts."""
    unchanged = Unchanged(checkpoint, manifest.files)
    subprocess.run(["cp", "-al", checkpoint, tmp_path / "backup"], check=True)
    for path in checkpoint.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o755)
    assert unchanged._stamps() != unchanged._before, "the test changed nothing"
    unchanged.check()


def test_the_same_bytes_in_a_new_file_are_unchanged(checkpoint: Path, manifest: Manifest) -> None:
    unchanged = Unchanged(checkpoint, manifest.files)
    data = (checkpoint / MODEL).read_bytes()
    (checkpoint / MODEL).unlink()
    (checkpoint / MODEL).write_bytes(data)
    assert unchanged._stamps() != unchanged._before, "the test changed nothing"
    unchanged.check()
