"""Where things are in a job directory, and which directories cannot be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.errors import DirectoryUnusable, ExitCode
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from tests.checkpoints import make_checkpoint, open_job, tree


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("epoch-0_step-0", (0, 0)),
        ("epoch-12_step-345", (12, 345)),
        ("epoch-1_step-999999999999999999", (1, 999999999999999999)),
        ("epoch-1_step-1000000000000000000", None),
        ("epoch-0_step-10/", None),
        ("epoch-0_step-10 ", None),
        ("epoch-0_step--1", None),
        ("xepoch-0_step-1", None),
        (".epoch-0_step-1", None),
        ("epoch-0_step-1-20260102T030405Z-ab12", None),
        ("", None),
    ],
)
def test_only_a_checkpoints_name_has_a_key(name: str, key: tuple[int, int] | None) -> None:
    assert checkpoint_key(name) == key


def test_a_checkpoints_place_has_its_own_key(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path)
    assert checkpoint_key(job.checkpoint(3, 120).name) == (3, 120)


def test_prepare_creates_what_is_missing_and_keeps_the_rest(tmp_path: Path) -> None:
    job = JobDirectory.at(tmp_path / "new" / "job")
    job.prepare()
    for place in (job.attempts, job.quarantine, job.requests, job.node_lock("n").parent,
                  job.node_record("n").parent, job.journal("n").parent):  # fmt: skip
        assert place.is_dir()
    make_checkpoint(job, 10)
    before = tree(job.root)
    job.prepare()
    assert tree(job.root) == before


def test_a_job_directory_is_absolute_and_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert JobDirectory.at("link").root == JobDirectory.at("real").root == tmp_path / "real"


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/none", "long" * 100])
def test_a_directory_that_cannot_be_created_is_one_line_and_73(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_bytes(b"not a directory")
    place = tmp_path / where
    with pytest.raises(DirectoryUnusable) as refusal:
        JobDirectory(place).prepare()
    message = str(refusal.value)
    assert str(place) in message and "\n" not in message
    assert "choose another directory" in message
    assert refusal.value.exit_code is ExitCode.UNAVAILABLE
    assert (tmp_path / "file").read_bytes() == b"not a directory"


@pytest.mark.parametrize("name", [".attempts", ".quarantine", ".elastic-ckpt"])
def test_a_file_in_place_of_the_control_directory_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DirectoryUnusable, match=name):
        JobDirectory(tmp_path).prepare()


def test_a_directory_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = open_job(tmp_path / "job")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != job.attempts)
    with pytest.raises(DirectoryUnusable, match=r"no permission to write in .*\.attempts"):
        job.prepare()


@pytest.mark.parametrize("where", ["missing", "file", "file/below"])
def test_a_directory_that_cannot_be_listed_is_unusable(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    before = tree(tmp_path)
    with pytest.raises(DirectoryUnusable, match=where):
        JobDirectory.at(tmp_path / where).check_readable()
    assert tree(tmp_path) == before


def test_a_directory_that_can_be_listed_is_not_touched(tmp_path: Path) -> None:
    JobDirectory.at(tmp_path).check_readable()
    assert tree(tmp_path) == {}
