"""What ``quick`` and ``full`` say of every kind of damage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint import verify
from elastic_ckpt.checkpoint.manifest import FORMAT, FileEntry, fingerprint, sign
from elastic_ckpt.checkpoint.verify import read_manifest, verify_files, verify_full, verify_quick
from elastic_ckpt.errors import CheckpointRejected, UnsupportedFormat
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import (
    MODEL,
    bounded,
    change_manifest,
    flip_bit,
    make_checkpoint,
    open_job,
)


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


@pytest.fixture
def checkpoint(job: JobDirectory) -> Path:
    return make_checkpoint(job, 10)


def missing(checkpoint: Path) -> None:
    (checkpoint / MODEL).unlink()


def truncated(checkpoint: Path) -> None:
    path = checkpoint / MODEL
    path.write_bytes(path.read_bytes()[:-1])


def extended(checkpoint: Path) -> None:
    with (checkpoint / MODEL).open("ab") as file:
        file.write(b"\0")


def linked_file(checkpoint: Path) -> None:
    outside = checkpoint.parent / "outside"
    (checkpoint / MODEL).rename(outside)
    (checkpoint / MODEL).symlink_to(outside)


def linked_directory(checkpoint: Path) -> None:
    outside = checkpoint.parent / "outside"
    (checkpoint / "modeling").rename(outside)
    (checkpoint / "modeling").symlink_to(outside)


def directory_for_file(checkpoint: Path) -> None:
    (checkpoint / MODEL).unlink()
    (checkpoint / MODEL).mkdir()


def file_for_directory(checkpoint: Path) -> None:
    (checkpoint / MODEL).unlink()
    (checkpoint / "modeling").rmdir()
    (checkpoint / "modeling").write_bytes(b"")


def missing_part(checkpoint: Path) -> None:
    (checkpoint / "parts" / "00001.json").unlink()


def no_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def empty_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b"")


def torn_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])


def binary_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b"\xff\xfe\x00")


def nested_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b'{"format":' + b"[" * 100_000)


def linked_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.rename(checkpoint / "seal.json")
    path.symlink_to("seal.json")


def directory_for_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").mkdir()


def other_size_in_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"bytes": 500', b'"bytes": 501'))


BOTH = [
    (missing, f"{MODEL} is missing"),
    (truncated, "has 499 bytes instead of 500"),
    (extended, "has 501 bytes instead of 500"),
    (linked_file, f"{MODEL} is not a regular file"),
    (linked_directory, "leads out of the checkpoint through a link"),
    (directory_for_file, f"{MODEL} is not a regular file"),
    (file_for_directory, f"{MODEL} is missing"),
    (missing_part, "parts/00001.json is missing"),
    (no_manifest, "not sealed"),
    (empty_manifest, "torn"),
    (torn_manifest, "torn"),
    (binary_manifest, "torn"),
    (nested_manifest, "torn"),
    (linked_manifest, "manifest.json"),
    (directory_for_manifest, "manifest.json is not a regular file"),
    (other_size_in_manifest, "its own digest does not match"),
]


@pytest.mark.parametrize("check", [verify_quick, verify_full])
@pytest.mark.parametrize(("damage", "words"), BOTH, ids=[case[0].__name__ for case in BOTH])
def test_damage_that_both_find(
    checkpoint: Path, damage: Callable[[Path], None], words: str, check: Callable[[Path], object]
) -> None:
    """The reason names what is wrong, and is a rejection and never an error of the disk."""
    check(checkpoint)
    damage(checkpoint)
    with pytest.raises(CheckpointRejected, match=words):
        check(checkpoint)


@pytest.mark.parametrize("name", [MODEL, "lr_scheduler", "ranks/00001.json", "parts/00000.json"])
def test_a_flipped_bit_is_found_by_full_alone(checkpoint: Path, name: str) -> None:
    """Sizes say nothing about contents; ``quick`` does not claim otherwise."""
    flip_bit(checkpoint / name)
    verify_quick(checkpoint)
    with pytest.raises(CheckpointRejected, match=f"{name} does not match its checksum"):
        verify_full(checkpoint)


@pytest.mark.parametrize("name", [MODEL, "manifest.json"])
@pytest.mark.parametrize("check", [verify_quick, verify_full])
def test_a_fifo_is_refused_without_waiting(
    checkpoint: Path, name: str, check: Callable[[Path], object]
) -> None:
    """A FIFO has no contents to wait for, be it a file or the seal itself."""
    fifo = checkpoint / name
    fifo.unlink()
    os.mkfifo(fifo)

    def refused() -> str:
        with pytest.raises(CheckpointRejected) as refusal:
            check(checkpoint)
        return str(refusal.value)

    assert "not a regular file" in bounded(refused, fifo)


def test_hashing_a_fifo_does_not_wait(checkpoint: Path) -> None:
    """The hashing itself is bounded too: a file may change after the sizes were compared."""
    entries = read_manifest(checkpoint).files
    fifo = checkpoint / MODEL
    fifo.unlink()
    os.mkfifo(fifo)

    def refused() -> None:
        with pytest.raises((CheckpointRejected, OSError)):
            verify_files(checkpoint, entries)

    bounded(refused, fifo)


@pytest.mark.parametrize(
    "name",
    [
        "modeling/extra.safetensors",
        "modeling/deep/down/extra.bin",
        "optimizer/extra.bin",
        "ranks/00002.json",
        "lr_scheduler-00001.bin",
    ],
)
def test_a_file_that_an_engine_might_load_must_be_listed(checkpoint: Path, name: str) -> None:
    """A file without a hash could be unpickled by a loader that globs."""
    path = checkpoint / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"extra")
    with pytest.raises(CheckpointRejected, match=f"{name} is not in the manifest"):
        verify_quick(checkpoint)


def test_a_link_to_a_directory_among_the_model_must_be_listed(checkpoint: Path) -> None:
    """A link is not followed, but it is seen."""
    (checkpoint / "modeling" / "more").symlink_to(checkpoint.parent)
    with pytest.raises(CheckpointRejected, match="modeling/more is not in the manifest"):
        verify_quick(checkpoint)


@pytest.mark.parametrize("name", ["README.md", "latest", "modeling/.nfs0000001"])
def test_a_file_that_no_engine_loads_does_no_harm(checkpoint: Path, name: str) -> None:
    """A note, or what a network file system leaves of an open file, makes nothing invalid."""
    (checkpoint / name).write_bytes(b"note")
    assert name not in [entry.path for entry in verify_full(checkpoint).files]


def test_a_renamed_checkpoint_is_refused(job: JobDirectory, checkpoint: Path) -> None:
    """The name orders the checkpoints, so it must be the manifest's own."""
    renamed = checkpoint.rename(job.checkpoint(0, 11))
    with pytest.raises(CheckpointRejected, match="epoch-0_step-10: the directory was renamed"):
        verify_quick(renamed)


def test_a_manifest_of_another_step_is_refused(job: JobDirectory, checkpoint: Path) -> None:
    """Its files may well have the same names and sizes."""
    other = make_checkpoint(job, 20)
    (checkpoint / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    with pytest.raises(CheckpointRejected, match="epoch-0_step-20"):
        verify_quick(checkpoint)


def test_a_newer_format_is_its_own_error(checkpoint: Path) -> None:
    """It is no damage: the message says to upgrade."""
    change_manifest(checkpoint, format=FORMAT + 1)
    with pytest.raises(UnsupportedFormat, match="upgrade"):
        verify_quick(checkpoint)


def test_unknown_keys_are_ignored(checkpoint: Path) -> None:
    """A later version may add keys without a new format."""
    path, before = checkpoint / "manifest.json", read_manifest(checkpoint)
    path.write_bytes(sign(path.read_bytes().replace(b"{", b'{"added_later": [1],', 1)))
    assert verify_full(checkpoint) == before


@pytest.mark.parametrize(
    "name",
    ["../job/x", "/etc/hostname", "a/../b", "a//b", "./a", "a/", "a\\b", "a\nb", "x" * 1025],
)
def test_an_unsafe_path_is_refused_before_anything_is_looked_at(
    checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked of the file system about a path that leads out."""
    files = [*read_manifest(checkpoint).files, FileEntry(name, 1, "0" * 32, 0)]
    change_manifest(checkpoint, files=files, fingerprint=fingerprint(files))
    looked_at: list[str] = []
    lstat = os.lstat

    def record(path: Path, **kwargs: object) -> os.stat_result:
        looked_at.append(str(path))
        return lstat(path)

    monkeypatch.setattr(os, "lstat", record)
    with pytest.raises(CheckpointRejected, match="unsafe path"):
        verify_full(checkpoint)
    assert looked_at == []


def test_a_path_listed_twice_is_refused(checkpoint: Path) -> None:
    """Which of the two would count?"""
    files = read_manifest(checkpoint).files
    files = [*files, files[0]]
    change_manifest(checkpoint, files=files, fingerprint=fingerprint(files))
    with pytest.raises(CheckpointRejected, match="twice"):
        verify_quick(checkpoint)


@pytest.mark.parametrize("field", ["step", "epoch", "sample_start_index"])
def test_a_negative_position_is_refused(checkpoint: Path, field: str) -> None:
    """No job has been there."""
    change_manifest(checkpoint, **{field: -1})
    with pytest.raises(CheckpointRejected, match="negative"):
        verify_quick(checkpoint)


def test_a_mismatch_that_a_second_read_does_not_confirm_is_none(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that flipped on the way to us, not on the disk, condemns nothing."""
    real, wrong = verify.hash_file, [(1, "0" * 32)]
    monkeypatch.setattr(
        verify, "hash_file", lambda path, *_, **__: wrong.pop() if wrong else real(path)
    )
    verify_full(checkpoint)
    assert wrong == []


def test_a_mismatch_that_a_second_read_confirms_counts(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is read afresh once, not again and again."""
    reads: list[Path] = []
    real = verify.hash_file

    def record(path: Path, *_: object, **__: object) -> tuple[int, str]:
        reads.append(path)
        return real(path)

    flip_bit(checkpoint / MODEL)
    monkeypatch.setattr(verify, "hash_file", record)
    with pytest.raises(CheckpointRejected, match="checksum"):
        verify_full(checkpoint)
    assert reads.count(checkpoint / MODEL) == 2


def test_a_disk_that_cannot_be_read_is_no_rejection(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint may still be good: an error of the disk never condemns it."""

    def broken(path: Path, *_: object, **__: object) -> tuple[int, str]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verify, "hash_file", broken)
    with pytest.raises(OSError, match="Input/output"):
        verify_full(checkpoint)


def test_a_directory_that_cannot_be_listed_is_no_rejection(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be as it should: an error of the disk never condemns a checkpoint."""
    real = os.scandir

    def broken(path: Path) -> object:
        if Path(path).name == "modeling":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(OSError, match="Input/output"):
        verify_quick(checkpoint)
