"""The part of one rank: its files are complete, and readable by their owner alone."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.hashed_file import BLOCK_BYTES
from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.checkpoint.manifest import decode_part
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import make_header, open_job


@pytest.fixture
def attempt(tmp_path: Path) -> DiskAttempt:
    return DiskAttempt.begin(open_job(tmp_path / "job"), 10)


@pytest.fixture
def part(attempt: DiskAttempt) -> DiskPart:
    return attempt.part(0)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_part_lists_what_was_written_and_itself(attempt: DiskAttempt, part: DiskPart) -> None:
    part.write("modeling/model.bin", b"weights")
    with part.open("optimizer/deep/er/state.bin") as file:
        file.write(b"mom")
        file.write(b"ents")
    entries = {entry.path: entry for entry in part.finish(2, make_header(attempt))}
    assert set(entries) == {
        "modeling/model.bin", "optimizer/deep/er/state.bin", "parts/00000.json",
    }  # fmt: skip
    for path, entry in entries.items():
        data = (attempt.path / path).read_bytes()
        assert (entry.bytes, entry.xxh3_128) == (len(data), xxhash.xxh3_128_hexdigest(data))
    manifest = decode_part((attempt.path / "parts/00000.json").read_bytes())
    assert {entry.path for entry in manifest.files} == set(entries) - {"parts/00000.json"}


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_an_error_leaves_no_entry(
    part: DiskPart, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    part.write("good", b"1")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        part.write("bad", b"2")
    monkeypatch.undo()
    assert part.paths == ["good"]
    assert set(os.listdir("/proc/self/fd")) == before


def test_an_error_that_the_block_swallows_is_raised_at_its_end(
    part: DiskPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some writers do: the file would be torn, and listed as if it were whole."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def careless() -> None:
        with part.open("torn") as file:
            monkeypatch.setattr(os, "write", full)
            with pytest.raises(OSError):
                file.write(b"data")
            monkeypatch.undo()
            file.write(b"more")

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        careless()
    assert part.paths == []


def test_an_error_of_the_block_is_the_one_that_is_seen(part: DiskPart) -> None:
    def fail() -> None:
        with part.open("file") as file:
            file.write(b"data")
            raise KeyError("the state")

    with pytest.raises(KeyError, match="the state"):
        fail()
    assert part.paths == []


def test_a_name_is_taken_once(part: DiskPart, attempt: DiskAttempt) -> None:
    part.write("file", b"1")
    with pytest.raises(FileExistsError):
        part.write("file", b"2")
    (attempt.path / "link").symlink_to("elsewhere")
    with pytest.raises(FileExistsError):
        part.write("link", b"2")
    assert part.paths == ["file"]
    assert (attempt.path / "file").read_bytes() == b"1"
    assert not (attempt.path / "elsewhere").exists()


@pytest.mark.parametrize("path", ["../out", "/out", "a/../../out", "", "a//b", "./a"])
def test_a_path_that_leads_out_is_refused(part: DiskPart, path: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRejected, match="unsafe"):
        part.write(path, b"")
    with pytest.raises(CheckpointRejected, match="unsafe"):
        part.claim(path)
    assert part.paths == []


@pytest.mark.parametrize("size", [0, 5, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_file_written_by_foreign_code_is_claimed(
    part: DiskPart, attempt: DiskAttempt, size: int
) -> None:
    data = b"x" * size
    (attempt.path / "file").write_bytes(data)
    part.claim("file")
    [entry, _] = part.finish(1, make_header(attempt, world_size=1))
    assert (entry.bytes, entry.xxh3_128) == (size, xxhash.xxh3_128_hexdigest(data))


@pytest.mark.parametrize("size", [5, BLOCK_BYTES + 1])
def test_a_claimed_file_that_cannot_be_made_durable_is_an_error(
    part: DiskPart, attempt: DiskAttempt, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    (attempt.path / "file").write_bytes(b"x" * size)

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        part.claim("file")
    assert part.paths == []


@pytest.mark.parametrize("what", ["hard link", "link", "directory", "fifo", "missing"])
def test_what_is_no_plain_file_of_its_own_is_not_claimed(
    part: DiskPart, attempt: DiskAttempt, tmp_path: Path, what: str
) -> None:
    place = attempt.path / "file"
    outside = tmp_path / "outside"
    outside.write_bytes(b"data")
    if what == "hard link":
        os.link(outside, place)
    elif what == "link":
        place.symlink_to(outside)
    elif what == "directory":
        place.mkdir()
    elif what == "fifo":
        os.mkfifo(place)
    with pytest.raises((OSError, CheckpointRejected)):
        part.claim("file")
    assert part.paths == []


# -- modes ------------------------------------------------------------------------------------


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write_all(job: JobDirectory) -> Path:
    """A checkpoint with files of ours, and files and directories that other code made."""
    attempt = DiskAttempt.begin(job, 10)
    part = attempt.part(0)
    part.write("modeling/model.bin", b"weights")
    (attempt.path / "optimizer" / "deep").mkdir(parents=True)
    for name in ("optimizer/index.json", "optimizer/deep/config.json"):
        with open(attempt.path / name, "w") as file:
            file.write("{}")
        part.claim(name)
    header = make_header(attempt, world_size=1)
    return attempt.publish(header, part.finish(1, header))


def modes(job: JobDirectory) -> tuple[set[int], set[int]]:
    """Of all directories and of all files, the job directory's own among them."""
    below = [job.root, *job.root.rglob("*")]
    return (
        {mode(path) for path in below if path.is_dir()},
        {mode(path) for path in below if path.is_file()},
    )


@pytest.mark.usefixtures("umask")
def test_only_the_owner_may_look_whatever_the_umask_is(tmp_path: Path) -> None:
    job = JobDirectory.at(tmp_path / "job")
    job.prepare()
    write_all(job)
    assert modes(job) == ({0o700}, {0o600})


@pytest.mark.usefixtures("umask")
def test_the_group_may_look_and_no_more_where_it_was_let_in(tmp_path: Path) -> None:
    job = JobDirectory.at(tmp_path / "job")
    job.prepare(group_access=True)
    write_all(job)
    assert modes(job) == ({0o750}, {0o640})


def test_a_job_that_lets_the_group_in_later_keeps_its_directory_s_other_bits(
    tmp_path: Path,
) -> None:
    """What is made from now on can be read by the group."""
    job = JobDirectory.at(tmp_path / "job")
    job.prepare()
    job.root.chmod(0o701)
    job.prepare(group_access=True)
    assert mode(job.root) == 0o751
    assert mode(write_all(job)) == 0o750


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a group that is not one's own")
@pytest.mark.usefixtures("umask")
def test_what_is_made_belongs_to_the_group_of_a_set_group_id_directory(tmp_path: Path) -> None:
    """The directory of a project: its group, not the user's own, is to read everything."""
    job = JobDirectory.at(tmp_path / "job")
    job.root.mkdir()
    os.chown(job.root, -1, 54321)
    os.chmod(job.root, 0o2770)
    job.prepare(group_access=True)
    checkpoint = write_all(job)
    for path in [checkpoint, *checkpoint.rglob("*")]:
        assert path.stat().st_gid == 54321, path
        assert mode(path) & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_a_file_system_without_modes_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: int | Path, mode: int) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "fchmod", refuse)
    job = JobDirectory.at(tmp_path / "job")
    job.prepare(group_access=True)
    assert write_all(job).is_dir()
