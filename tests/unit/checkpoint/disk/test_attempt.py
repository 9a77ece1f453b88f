"""Sealing and publishing an attempt, and what a restart makes of those that were left."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from elastic_ckpt.checkpoint import verify
from elastic_ckpt.checkpoint.catalog import newest_intact, scan
from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.lineage import superseded
from elastic_ckpt.checkpoint.manifest import PartManifest, decode_part, encode, sign
from elastic_ckpt.checkpoint.quarantine import rejected
from elastic_ckpt.checkpoint.verify import read_manifest, verify_full
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import (
    FILES,
    MODEL,
    bounded,
    change_manifest,
    fill,
    flip_bit,
    make_attempt,
    make_checkpoint,
    make_header,
    open_job,
    seal_in_place,
    tree,
)

OTHER = {MODEL: b"other" * 100}


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def seal(attempt: DiskAttempt, contents: dict[str, bytes]) -> Path:
    header = make_header(attempt)
    return attempt.publish(header, fill(attempt, header, contents=contents))


# -- seal and publish -----------------------------------------------------------------------


def test_a_sealed_attempt_is_a_checkpoint_with_every_file(job: JobDirectory) -> None:
    """The checkpoint passes the full verification and the attempt is gone."""
    path = make_checkpoint(job, 10, epoch=2)
    assert path == job.root / "epoch-2_step-10"
    manifest = verify_full(path)
    listed = {entry.path: entry.rank for entry in manifest.files}
    assert listed == {
        **dict.fromkeys(FILES, 0),
        "ranks/00000.json": 0,
        "ranks/00001.json": 1,
        "parts/00000.json": 0,
        "parts/00001.json": 1,
    }
    assert list(job.attempts.iterdir()) == []


def test_a_part_of_a_missing_file_is_not_written(job: JobDirectory) -> None:
    """A rank that could not write its files leaves no part that says it did."""
    attempt = DiskAttempt.begin(job, 10)
    with pytest.raises(FileNotFoundError):
        attempt.part(1).claim("ranks/00001.json")
    assert list((attempt.path / "parts").iterdir()) == []


def test_two_attempts_at_one_step_do_not_share_a_directory(job: JobDirectory) -> None:
    """Each try has a directory of its own, so that a leftover blocks nothing."""
    assert DiskAttempt.begin(job, 10).path != DiskAttempt.begin(job, 10).path


@pytest.mark.parametrize("one_host", [True, False])
def test_everything_is_on_the_disk_before_the_rename(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, one_host: bool
) -> None:
    """Files, part manifests, directories, the seal, the rename, then the name's own directory. The
    ranks of several hosts sync the directories, too, before each says that it is done."""
    done: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record_fsync(fd: int) -> None:
        done.append(("fsync", str(Path(f"/proc/self/fd/{fd}").readlink())))
        fsync(fd)

    def record_rename(source: Path, target: Path) -> None:
        done.append(("rename", str(target)))
        rename(source, target)

    def record_replace(source: Path, target: Path) -> None:
        done.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", record_replace)
    attempt = DiskAttempt.begin(job, 10, one_host=one_host)
    path = seal(attempt, FILES)

    sealed = done.index(("replace", str(attempt.path / "manifest.json")))
    parts = {}
    for rank in range(2):
        part = str(attempt.path / f"parts/{rank:05d}.json")
        parts[rank] = done.index(("fsync", part) if one_host else ("replace", part))
    for name in [*FILES, "ranks/00000.json", "ranks/00001.json"]:
        written = done.index(("fsync", str(attempt.path / name)))
        assert written < parts["00001" in name] < sealed, name
    for directory in ("modeling", "optimizer", "ranks", "parts"):
        synced = ("fsync", str(attempt.path / directory))
        assert synced in done[parts[1] : sealed], directory
        told = {"ranks": parts[1], "parts": sealed}.get(directory, parts[0])
        assert one_host or synced in done[:told], directory
    published = done.index(("rename", str(path)))
    kind, temporary = done[sealed - 1]
    assert kind == "fsync" and ".tmp-manifest.json" in temporary
    assert ("fsync", str(attempt.path)) in done[sealed:published]
    assert ("fsync", str(job.root)) in done[published:]


def test_checkpoint_with_the_same_state_in_its_place_is_kept(job: JobDirectory) -> None:
    """The attempt is dropped; the checkpoint that stands there is not touched."""
    path = make_checkpoint(job, 10)
    before = tree(path)
    attempt = DiskAttempt.begin(job, 10)
    assert seal(attempt, FILES) == path
    assert tree(path) == before
    assert not attempt.path.exists()
    assert rejected(job) == superseded(job) == []


def test_step_that_is_saved_again_holds_the_last_state(job: JobDirectory) -> None:
    """A save never reports success for bytes that are not its own."""
    make_checkpoint(job, 10)
    path = seal(DiskAttempt.begin(job, 10), OTHER)
    assert (path / MODEL).read_bytes() == OTHER[MODEL]
    verify_full(path)
    assert superseded(job) == [] and list(job.trash.iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "missing", "unsealed", "newer"])
def test_an_invalid_checkpoint_in_its_place_is_set_aside(job: JobDirectory, damage: str) -> None:
    """The new one takes the place, the old one is kept in quarantine with its reason."""
    path = make_checkpoint(job, 10)
    if damage == "flipped":
        flip_bit(path / MODEL)
    elif damage == "missing":
        (path / MODEL).unlink()
    elif damage == "unsealed":
        (path / "manifest.json").unlink()
    else:
        change_manifest(path, format=99)
    left = tree(path)
    assert seal(DiskAttempt.begin(job, 10), OTHER) == path
    assert (path / MODEL).read_bytes() == OTHER[MODEL]
    verify_full(path)
    [record] = rejected(job)
    assert tree(Path(record.path)) == left
    words = {"flipped": "checksum", "missing": "missing", "unsealed": "not sealed", "newer": "99"}
    assert words[damage] in record.reason
    assert list(job.attempts.iterdir()) == []


def test_the_same_attempt_in_its_place_is_success(
    job: JobDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever lost the race to the name has saved all the same, and hashes nothing again."""

    def hashed(path: Path) -> NoReturn:
        raise AssertionError("hashed under a deadline")

    attempt = DiskAttempt.begin(job, 10)
    header = make_header(attempt)
    files = fill(attempt, header)
    shutil.copytree(attempt.path, tmp_path / "copy")
    path = attempt.publish(header, files)
    (tmp_path / "copy").rename(attempt.path)
    monkeypatch.setattr(verify, "hash_file", hashed)
    assert attempt.publish(header, files) == path
    monkeypatch.undo()
    assert not attempt.path.exists()
    assert rejected(job) == []
    verify_full(path)


def test_a_rename_that_was_done_but_reported_lost_is_success(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated request on a network file system, or another node's rename: ENOENT, yet done."""
    rename = os.rename

    def renamed_by_another(source: Path, target: Path) -> None:
        rename(source, target)
        raise FileNotFoundError(errno.ENOENT, "no such file", source)

    attempt = DiskAttempt.begin(job, 10)
    header = make_header(attempt)
    files = fill(attempt, header)
    monkeypatch.setattr(os, "rename", renamed_by_another)
    path = attempt.publish(header, files)
    monkeypatch.undo()
    assert read_manifest(path).attempt == attempt.identity
    assert rejected(job) == []


@pytest.mark.parametrize("place", ["empty", "another attempt's", "a link", "a file"])
def test_an_attempt_that_vanished_is_no_success(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Without a checkpoint of ours in the place, a lost rename is an error."""
    target = job.checkpoint(0, 10)
    if place == "another attempt's":
        make_checkpoint(job, 10)
    elif place == "a link":
        target.symlink_to("nowhere")
    elif place == "a file":
        target.write_bytes(b"a note")
    attempt = DiskAttempt.begin(job, 10)
    header = make_header(attempt)
    files = fill(attempt, header)

    def vanish(source: Path, target: Path) -> NoReturn:
        attempt.drop()
        raise FileNotFoundError(errno.ENOENT, "no such file", source)

    monkeypatch.setattr(os, "rename", vanish)
    with pytest.raises(OSError):
        attempt.publish(header, files)


def test_a_file_in_its_place_is_set_aside(job: JobDirectory) -> None:
    """A stray file of that name must not block every save of the step."""
    target = job.checkpoint(0, 10)
    target.write_bytes(b"a note")
    assert seal(DiskAttempt.begin(job, 10), FILES) == target
    verify_full(target)
    [record] = rejected(job)
    assert Path(record.path).read_bytes() == b"a note"


@pytest.mark.parametrize("leads", ["to an intact checkpoint", "nowhere"])
def test_a_link_in_its_place_is_set_aside(job: JobDirectory, tmp_path: Path, leads: str) -> None:
    """No restart takes a link for a checkpoint, so it must not swallow the attempt either."""
    elsewhere = tmp_path / "elsewhere"
    if leads == "to an intact checkpoint":
        make_checkpoint(open_job(tmp_path / "another"), 10).rename(elsewhere)
    target = job.checkpoint(0, 10)
    target.symlink_to(elsewhere)
    before = tree(tmp_path / "elsewhere")
    assert seal(DiskAttempt.begin(job, 10), OTHER) == target
    assert not target.is_symlink()
    assert scan(job) == [target]
    verify_full(target)
    assert tree(tmp_path / "elsewhere") == before


def test_an_empty_directory_in_its_place_is_replaced(job: JobDirectory) -> None:
    """A directory that holds nothing is nothing to keep."""
    target = job.checkpoint(0, 10)
    target.mkdir()
    assert seal(DiskAttempt.begin(job, 10), FILES) == target
    verify_full(target)


def test_a_disk_that_refuses_the_rename_leaves_an_attempt_for_the_restart(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error reaches the caller, no checkpoint appears, and recovery publishes it later."""

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rename", refuse)
    attempt = DiskAttempt.begin(job, 10)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        seal(attempt, FILES)
    monkeypatch.undo()
    assert scan(job) == []
    assert recover(job) == [(job.checkpoint(0, 10), "sealed")]
    verify_full(job.checkpoint(0, 10))


def test_dropping_takes_everything_and_may_be_repeated(job: JobDirectory) -> None:
    """Whatever a dead writer left in the attempt goes with it."""
    attempt = make_attempt(job)
    (attempt.path / "modeling" / ".tmp-half").write_bytes(b"half")
    attempt.drop()
    attempt.drop()
    assert list(job.attempts.iterdir()) == []


# -- recovery -------------------------------------------------------------------------------


def test_a_complete_attempt_is_sealed(job: JobDirectory) -> None:
    """All parts are there and verified: a kill just before the seal loses nothing."""
    attempt = make_attempt(job, 20, epoch=1, world_size=3)
    target = job.checkpoint(1, 20)
    assert recover(job) == [(target, "sealed")]
    manifest = verify_full(target)
    assert (manifest.attempt, manifest.world_size) == (attempt.identity, 3)
    assert not attempt.path.exists()


def test_a_sealed_attempt_is_published(job: JobDirectory) -> None:
    """A kill between the seal and the rename loses nothing either."""
    attempt = DiskAttempt.begin(job, 20)
    seal_in_place(attempt)
    target = job.checkpoint(0, 20)
    assert recover(job) == [(target, "sealed")]
    assert verify_full(target).attempt == attempt.identity
    assert not attempt.path.exists()


def test_a_sealed_attempt_with_a_corrupted_file_is_removed(job: JobDirectory) -> None:
    """The seal alone is not believed."""
    attempt = DiskAttempt.begin(job, 20)
    seal_in_place(attempt)
    flip_bit(attempt.path / MODEL)
    [(path, what)] = recover(job)
    assert path == attempt.path and what.startswith("removed") and MODEL in what
    assert not attempt.path.exists() and scan(job) == []


@pytest.mark.parametrize("ranks", [(), (0,), (1,)], ids=["none", "only-0", "only-1"])
def test_an_attempt_that_lacks_a_part_is_removed(job: JobDirectory, ranks: tuple[int]) -> None:
    """The other checkpoint stays the newest, and nothing blocks the next save of the step."""
    kept = make_checkpoint(job, 10)
    attempt = make_attempt(job, 20, ranks=ranks)
    [(path, what)] = recover(job)
    assert path == attempt.path and "is missing" in what
    assert not attempt.path.exists() and scan(job) == [kept]
    assert make_checkpoint(job, 20) == job.checkpoint(0, 20)


def flip(path: Path) -> None:
    flip_bit(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    path.rename(path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def parent_link(path: Path) -> None:
    outside = path.parents[3] / "outside"
    path.parent.rename(outside)
    path.parent.symlink_to(outside)


@pytest.mark.parametrize("damage", [flip, truncate, remove, link, directory, parent_link])
def test_an_attempt_with_a_damaged_file_is_removed(job: JobDirectory, damage: object) -> None:
    """It is removed, not sealed and not an error that would stop every later run."""
    kept = make_checkpoint(job, 10)
    attempt = make_attempt(job, 20)
    damage(attempt.path / MODEL)  # type: ignore[operator]
    [(path, what)] = recover(job)
    assert path == attempt.path and what.startswith("removed")
    assert not attempt.path.exists() and scan(job) == [kept]


def test_a_fifo_in_an_attempt_does_not_hang_the_restart(job: JobDirectory) -> None:
    """Recovery opens only regular files."""
    attempt = make_attempt(job, 20)
    fifo = attempt.path / MODEL
    fifo.unlink()
    os.mkfifo(fifo)
    [(_, what)] = bounded(lambda: recover(job), fifo)
    assert what.startswith("removed")
    assert scan(job) == []


def test_a_file_that_no_part_lists_keeps_an_attempt_from_being_sealed(job: JobDirectory) -> None:
    """Sealed with it, the checkpoint would be refused by the next load."""
    attempt = make_attempt(job, 20)
    (attempt.path / "modeling" / "late.safetensors").write_bytes(b"late")
    recover(job)
    assert all(newest_intact(job) is not None for _ in scan(job))
    assert not attempt.path.exists()


@pytest.mark.parametrize(
    "change",
    [{"attempt": "f" * 16}, {"rank": 0}, {"world_size": 3}],
    ids=lambda change: next(iter(change)),
)
def test_a_part_that_contradicts_its_attempt_is_not_believed(
    job: JobDirectory, change: dict[str, object]
) -> None:
    """A part of another attempt, rank or world size completes nothing."""
    attempt = make_attempt(job, 20)
    path = attempt.path / "parts" / "00001.json"
    part = decode_part(path.read_bytes())
    fields = {name: getattr(part, name) for name in part.__struct_fields__}
    path.write_bytes(encode(PartManifest(**{**fields, **change})))
    [(_, what)] = recover(job)
    assert what.startswith("removed") and scan(job) == []


@pytest.mark.parametrize("header", [{"attempt": "f" * 16}, {"step": 21}, {"world_size": 3}])
def test_a_header_of_another_checkpoint_is_not_believed(
    job: JobDirectory, header: dict[str, object]
) -> None:
    """Part 0 says what the checkpoint is; it must be this attempt's own word."""
    attempt = make_attempt(job, 20)
    path = attempt.path / "parts" / "00000.json"
    part = decode_part(path.read_bytes())
    path.write_bytes(
        encode(
            PartManifest(
                attempt=part.attempt,
                rank=0,
                world_size=2,
                files=part.files,
                header=msgspec.structs.replace(make_header(attempt), **header),
            )
        )
    )
    [(_, what)] = recover(job)
    assert what.startswith("removed") and scan(job) == []


@pytest.mark.parametrize("name", ["../../../secret", "/etc/hostname", "a//b", "./a"])
def test_a_part_with_an_unsafe_path_opens_nothing(
    job: JobDirectory, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is refused before anything is opened, and the attempt is removed."""
    attempt = make_attempt(job, 20)
    path = attempt.path / "parts" / "00001.json"
    path.write_bytes(sign(path.read_bytes().replace(b"ranks/00001.json", name.encode())))
    opened: list[str] = []
    real = os.open

    def record(path: object, *args: object, **kwargs: object) -> int:
        opened.append(os.fspath(path))  # type: ignore[call-overload]
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", record)
    [(_, what)] = recover(job)
    assert "unsafe path" in what
    assert not [path for path in opened if path.endswith(name)]


def test_an_attempt_of_a_newer_version_is_left_to_it(job: JobDirectory) -> None:
    """Nobody loads it, and after a step back and forth between versions it is still there."""
    attempt = DiskAttempt.begin(job, 20)
    seal_in_place(attempt)
    change_manifest(attempt.path, format=99)
    before = tree(attempt.path)
    [(path, what)] = recover(job)
    assert path == attempt.path and not what.startswith(("removed", "sealed"))
    assert tree(attempt.path) == before and scan(job) == []


@pytest.mark.parametrize("failing", ["fsync", "read"])
def test_a_disk_that_fails_neither_removes_an_attempt_nor_stops_the_run(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """It may be whole: the next recovery looks again."""
    attempt = make_attempt(job, 20)

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(verify, "hash_file", fail)
    [(path, what)] = recover(job)
    assert path == attempt.path and os.strerror(errno.EIO) in what
    monkeypatch.undo()
    assert scan(job) == []
    assert recover(job) == [(job.checkpoint(0, 20), "sealed")]


def test_attempt_yields_to_a_later_incarnation(job: JobDirectory) -> None:
    """Recovery keeps what a restart may already have loaded."""
    path = make_checkpoint(job, 10, incarnation=2)
    before = tree(path)
    make_attempt(job, 10, contents=OTHER)
    assert recover(job) == [(path, "sealed")]
    assert tree(path) == before
    assert list(job.attempts.iterdir()) == []


def test_each_attempt_is_judged_on_its_own(job: JobDirectory) -> None:
    """One that is incomplete does not keep the others from being sealed."""
    make_attempt(job, 9)
    make_attempt(job, 20, ranks=(0,))
    seal_in_place(DiskAttempt.begin(job, 100))
    done = {path.name: what.split(":")[0] for path, what in recover(job)}
    assert done.pop("epoch-0_step-9") == done.pop("epoch-0_step-100") == "sealed"
    assert list(done.values()) == ["removed"]
    assert [path.name for path in scan(job)] == ["epoch-0_step-100", "epoch-0_step-9"]


def test_recovery_repeated_changes_nothing(job: JobDirectory) -> None:
    """The second call finds no attempt and leaves every byte as it is."""
    make_attempt(job, 10)
    make_attempt(job, 20, ranks=(0,))
    recover(job)
    before = tree(job.root)
    assert recover(job) == []
    assert tree(job.root) == before


def test_names_that_are_no_attempts_are_left_alone(job: JobDirectory, tmp_path: Path) -> None:
    """What we did not make we do not remove, and do not say that we did."""
    complete = make_attempt(job, 10)
    identity = complete.identity
    complete.path.rename(tmp_path / "complete")
    for name in ("notes", "10-short", f"-{identity}", f"ten-{identity}", f"010-{identity}"):
        (job.attempts / name).mkdir()
    (job.attempts / f"11-{identity}").write_bytes(b"a file")
    (job.attempts / f"12-{identity}").symlink_to(tmp_path / "complete")
    before = tree(job.attempts)
    assert recover(job) == []
    assert tree(job.attempts) == before
    assert scan(job) == []
