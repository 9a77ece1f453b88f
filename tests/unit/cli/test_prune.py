"""``elastic-ckpt prune``: its output and exit codes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.lineage import supersede_newer
from elastic_ckpt.checkpoint.verify import is_verified, read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import MODEL, flip_bit, make_checkpoint, open_job, tree
from tests.unit.cli.test_app import Command, assert_one_line_of_error, cli, no_supervisor, script

__all__ = ["cli", "no_supervisor", "script"]


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    job = open_job(tmp_path / "job")
    for step in (10, 20, 30):
        make_checkpoint(job, step, metrics={"loss": 40.0 - step})
    return job


def names(job: JobDirectory) -> list[str]:
    return [path.name for path in scan(job)]


def test_each_checkpoint_is_listed_with_the_reason(cli: Command, job: JobDirectory) -> None:
    said = cli("prune", job.root, "--keep-last", 2)
    assert said.code == 0 and said.err == ""
    lines = said.out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["kept", "epoch-0_step-30"], ["kept", "epoch-0_step-20"], ["deleted", "epoch-0_step-10"],
    ]  # fmt: skip
    assert "the newest" in lines[0] and "one of the last 2" in lines[1]
    assert lines[3].startswith("1 of 3 deleted, ")
    assert names(job) == ["epoch-0_step-30", "epoch-0_step-20"]


def test_a_dry_run_prints_the_same_and_changes_nothing(cli: Command, job: JobDirectory) -> None:
    before = tree(job.root)
    said = cli("prune", job.root, "--keep-last", 2, "--dry-run")
    assert said.code == 0
    assert "would go  epoch-0_step-10" in said.out and "1 of 3 would go" in said.out
    assert tree(job.root) == before
    assert cli("prune", job.root, "--keep-last", 2).out == said.out.replace(
        "would go", "deleted "
    ).replace("deleted ,", "deleted,")


def test_prune_as_json(cli: Command, job: JobDirectory) -> None:
    rows = cli("prune", job.root, "--keep-best", "1:loss", "--dry-run", "--json").json
    assert [(row["step"], row["keep"]) for row in rows] == [(30, True), (20, False), (10, False)]
    assert rows[1] == {
        "path": str(job.checkpoint(0, 20)),
        "step": 20,
        "bytes": rows[1]["bytes"],
        "keep": False,
        "why": "no rule keeps it",
        "failed": False,
    }
    assert rows == cli("prune", job.root, "--keep-best", "1:loss", "--json").json
    assert names(job) == ["epoch-0_step-30"]


def test_the_best_can_be_the_highest(cli: Command, job: JobDirectory) -> None:
    cli("prune", job.root, "--keep-best", "1:loss:max")
    assert names(job) == ["epoch-0_step-30", "epoch-0_step-10"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--keep-last"),
        (["--keep-last", "0"], "--keep-last"),
        (["--dry-run"], "--keep-last"),
        (["--keep-last", "-1"], "--keep-last"),
        (["--keep-last", "few"], "--keep-last"),
        (["--keep-best", "loss"], "N:METRIC"),
        (["--keep-best", ""], "N:METRIC"),
        (["--keep-last", "2", "--keep-best", "0:loss"], "N:METRIC"),
    ],
    ids=str,
)
def test_a_missing_or_invalid_rule_is_64_and_deletes_nothing(
    cli: Command, job: JobDirectory, flags: list[str], words: str
) -> None:
    before = tree(job.root)
    said = cli("prune", job.root, *flags)
    assert said.code == 64 and words in said.err
    assert_one_line_of_error(said)
    assert tree(job.root) == before


@pytest.mark.usefixtures("no_supervisor")
@pytest.mark.parametrize("flags", [["--keep-best", ""], ["--keep-best", "x"], ["--keep-last", "x"]])
def test_an_invalid_rule_of_run_is_64(
    cli: Command, tmp_path: Path, script: Path, flags: list[str]
) -> None:
    said = cli("run", "--dir", tmp_path / "job", *flags, "--", script)
    assert said.code == 64
    assert not (tmp_path / "job").exists()


def test_a_missing_directory_is_73(cli: Command, tmp_path: Path) -> None:
    said = cli("prune", tmp_path / "missing", "--keep-last", 1)
    assert said.code == 73
    assert_one_line_of_error(said)


def test_an_empty_directory_has_nothing_to_prune(cli: Command, tmp_path: Path) -> None:
    """Nothing is created in it: it may not be a job's."""
    said = cli("prune", tmp_path, "--keep-last", 1)
    assert (said.code, said.out) == (0, "0 of 0 deleted, 0 Bytes\n")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_deletion_is_73_and_reported(
    cli: Command, job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only file system."""
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(target).parent == job.trash:
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    said = cli("prune", job.root, "--keep-last", 1)
    assert said.code == 73
    assert said.out.count("cannot be removed: Permission denied") == 2
    assert len(names(job)) == 3


def test_a_full_verification_is_remembered_for_retention(cli: Command, job: JobDirectory) -> None:
    """Only verify --full counts; the newest verified checkpoint is kept."""
    path = job.checkpoint(0, 20)
    assert cli("verify", path).code == 0
    assert not is_verified(job, path, read_manifest(path))
    assert cli("verify", path, "--full").code == 0
    assert is_verified(job, path, read_manifest(path))
    cli("prune", job.root, "--keep-last", 1)
    assert names(job) == ["epoch-0_step-30", "epoch-0_step-20"]


def test_a_failed_verification_is_remembered_for_retention(cli: Command, job: JobDirectory) -> None:
    """A checkpoint that was verified once loses a bit, and is verified again."""
    assert cli("verify", job.checkpoint(0, 20), "--full").code == 0
    flip_bit(job.checkpoint(0, 20) / MODEL)
    flip_bit(job.checkpoint(0, 30) / MODEL)
    assert cli("verify", job.root, "--full").code == 65
    cli("prune", job.root, "--keep-last", 1)
    assert names(job) == ["epoch-0_step-30", "epoch-0_step-10"]


@pytest.mark.usefixtures("no_supervisor")
@pytest.mark.parametrize(
    "command",
    [["prune", "--keep-last", "1"], ["list"], ["verify"], ["status", "--json"], ["save"]],
    ids=lambda command: command[0],
)
def test_a_directory_name_that_is_not_utf_8_is_refused(
    cli: Command, tmp_path: Path, command: list[str]
) -> None:
    """Manifests and records cannot contain its path."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/job-\xff"))
    root.mkdir()
    said = cli(command[0], root, *command[1:])
    assert said.code == 73 and "not UTF-8" in said.err
    assert_one_line_of_error(said)


def test_superseded_ones_are_listed_and_counted(cli: Command, job: JobDirectory) -> None:
    """The name that list prints is the one that restore takes."""
    supersede_newer(job, (0, 10), "the job was continued from step 10")
    listed = cli("list", job.root).out
    header, *rows = listed[listed.index("2 superseded, ") :].splitlines()
    assert header.endswith(f"elastic-ckpt restore {job.root} NAME goes back to one:")
    assert all("the job was continued from step 10" in row for row in rows) and len(rows) == 2
    assert "kept 2 of 2 superseded, " in cli("prune", job.root, "--keep-last", "2").out
    said = cli("restore", job.root, max(rows).split()[0])
    assert said.code == 0, said.err
    assert names(job)[0] == "epoch-0_step-30"
    said = cli("prune", job.root, "--keep-superseded", "0")
    assert said.code == 0 and "kept 0 of 0" not in said.out


def test_restore_of_a_named_session_takes_the_name_that_list_prints(
    cli: Command, job: JobDirectory
) -> None:
    fold = job.session("fold0")
    fold.prepare()
    for step in (10, 20):
        make_checkpoint(fold, step, session="fold0")
    supersede_newer(fold, (0, 10), "again")
    rows = cli("list", job.root).out.splitlines()
    name = rows[-1].split()[0]
    assert name.startswith("fold0/epoch-0_step-20-")
    said = cli("restore", job.root, name)
    assert said.code == 0 and "continues from fold0/epoch-0_step-20\n" in said.out
    said = cli("restore", job.root, "fold0/epoch-0_step-10")
    assert said.code == 0 and "superseded  fold0/epoch-0_step-20-" in said.out
    assert names(fold) == ["epoch-0_step-10"] and names(job)[0] == "epoch-0_step-30"
    said = cli("restore", job.root, "fold1/epoch-0_step-10")
    assert said.code == 64 and "no checkpoint called fold1/epoch-0_step-10" in said.err
    assert cli("restore", job.root, "../epoch-0_step-10").code == 64


@pytest.mark.usefixtures("no_supervisor")
@pytest.mark.parametrize("inner", ["sessions/fold0", "sessions/new/deep", ".superseded", ".trash"])
def test_run_in_a_directory_of_another_job_names_that_job(
    cli: Command, job: JobDirectory, script: Path, inner: str
) -> None:
    job.session("fold0").prepare()
    said = cli("run", "--dir", job.root / inner, "--", script)
    assert said.code == 64 and f"pass --dir {job.root}" in said.err
    assert said.err.count("\n") == 3 and said.err.endswith("\n  elastic-ckpt run --help\n")
    assert not (job.root / "sessions/new").exists()
