"""What ColossalAI saves through ``torch.save`` is hashed on its way to the disk."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import xxhash

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.training.engines.colossalai.torch_archive import torch_save_through
from tests.checkpoints import open_job

STATE = {
    "weights": torch.arange(3_000_000.0),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0),
    "steps": 7,
    "names": ["a", ("b", None)],
}


@pytest.fixture
def saving(tmp_path: Path) -> DiskAttempt:
    return DiskAttempt.begin(open_job(tmp_path / "job"), 1)


@pytest.fixture
def part(saving: DiskAttempt) -> DiskPart:
    return saving.part(0)


@pytest.fixture
def attempt(saving: DiskAttempt) -> Path:
    return saving.path


def same(found: dict[str, object]) -> bool:
    return all(
        torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value  # type: ignore[arg-type]
        for name, value in STATE.items()
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_equals_that_of_a_plain_save(part: DiskPart, attempt: Path, zipped: bool) -> None:
    """And its digest is that of its bytes, in both of torch's formats."""
    with torch_save_through(attempt, part):
        torch.save(STATE, attempt / "model.bin", _use_new_zipfile_serialization=zipped)
    assert same(torch.load(attempt / "model.bin", weights_only=True))
    entry, _ = part.finish(2, None)
    data = (attempt / "model.bin").read_bytes()
    assert (entry.path, entry.bytes) == ("model.bin", len(data))
    assert entry.xxh3_128 == xxhash.xxh3_128_hexdigest(data)


def test_a_text_path_and_a_missing_directory_are_accepted(part: DiskPart, attempt: Path) -> None:
    with torch_save_through(attempt, part):
        torch.save(STATE, str(attempt / "optimizer" / "deep" / "state.bin"))
    assert part.paths == ["optimizer/deep/state.bin"]
    assert same(torch.load(attempt / "optimizer/deep/state.bin", weights_only=True))


def test_a_save_to_another_directory_is_unchanged(
    part: DiskPart, attempt: Path, tmp_path: Path
) -> None:
    """Another directory, one whose name only begins alike, an open file, a file that is there."""
    (attempt / "there").write_bytes(b"")
    beside = attempt.with_name(attempt.name + "-more")
    beside.mkdir()
    buffer = io.BytesIO()
    with torch_save_through(attempt, part):
        torch.save(STATE, tmp_path / "outside.bin")
        torch.save(STATE, beside / "model.bin")
        torch.save(STATE, attempt / ".." / "up.bin")
        torch.save(STATE, buffer)
        torch.save(STATE, attempt / "there")
    assert part.paths == []
    assert same(torch.load(attempt / "there", weights_only=True))
    assert same(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))


def test_a_file_of_another_rank_is_not_touched(part: DiskPart, attempt: Path) -> None:
    """It may be half written by then: to write into it is to pull the ground from under a rank."""
    asked = []

    def takes(path: str, obj: object, tensor_bytes: int) -> bool:
        asked.append((path, tensor_bytes))
        return path == "mine.bin"

    (attempt / "theirs.bin").write_bytes(b"half")
    with torch_save_through(attempt, part, takes):
        torch.save(STATE, attempt / "theirs.bin")
        torch.save(STATE, attempt / "not there.bin")
        torch.save(STATE, attempt / "mine.bin")
    assert (attempt / "theirs.bin").read_bytes() == b"half"
    assert not (attempt / "not there.bin").exists()
    assert part.paths == ["mine.bin"]
    assert asked == [(name, 12_000_006) for name in ("theirs.bin", "not there.bin", "mine.bin")]


def test_torch_save_is_restored_after_an_error(part: DiskPart, attempt: Path) -> None:
    plain = torch.save

    def fail() -> None:
        with torch_save_through(attempt, part):
            torch.save(lambda: None, attempt / "no.bin")

    with pytest.raises(Exception, match="pickle"):
        fail()
    assert torch.save is plain
    assert part.paths == []


@pytest.mark.parametrize("zipped", [True, False])
def test_a_full_disk_is_an_os_error(
    part: DiskPart, attempt: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    """Torch makes a RuntimeError of it; the caller must know that the storage said no."""
    import errno
    import os

    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with torch_save_through(attempt, part), pytest.raises(OSError, match="No space"):
        torch.save(STATE, attempt / "model.bin", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    assert part.paths == []
