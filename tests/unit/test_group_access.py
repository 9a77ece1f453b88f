"""Another user of the group may look at a job, and changes nothing by it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.verify import is_verified, read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import Saved
from elastic_ckpt.journal.journal import Journal
from tests.checkpoints import make_checkpoint, open_job, tree

USER, GROUP, OTHER_GROUP = 54321, 54322, 54323

pytestmark = [
    pytest.mark.one_torch,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user"),
]


AS_USER = """
import contextlib, io, os, sys
from elastic_ckpt.cli.app import main
import elastic_ckpt.supervisor.wiring

def call(*arguments):
    sys.argv = ["elastic-ckpt", *arguments]
    main()

user, group, warm_up, command, directory, *more = sys.argv[1:]
if command != "run":
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            call(command, warm_up, *more)
os.setgroups([])
os.setgid(int(group))
os.setuid(int(user))
call(command, directory, *more)
"""
"""Runs a command twice, first elsewhere: another user may not be allowed to read our modules."""


def as_user(
    job: JobDirectory, group: int, command: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user who shares only a group with the owner."""
    directory = f"--dir={job.root}" if command == "run" else job.root
    warm_up = job.root.with_name("warm-up")
    if not warm_up.exists():
        make_checkpoint(open_job(warm_up), 10)
    given = [USER, group, warm_up, command, directory, *arguments]
    return subprocess.run(
        [sys.executable, "-c", AS_USER, *map(str, given)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip


@pytest.fixture
def place() -> Iterator[Path]:
    """Somewhere that all may enter; pytest's own directories are closed to others."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o711)
    yield place
    shutil.rmtree(place)


def make_job(place: Path, *, group_access: bool) -> JobDirectory:
    job = JobDirectory(place / "job")
    job.root.mkdir(0o700)
    os.chown(job.root, -1, GROUP)
    if group_access:
        job.root.chmod(0o2750)
    before = os.umask(0o077)
    try:
        job.prepare(group_access=group_access)
        make_checkpoint(job, 10)
        make_checkpoint(job, 20)
        Journal(job, "here").write(Saved(step=20, reason="interval", seconds=1.5))
    finally:
        os.umask(before)
    return job


def test_group_can_read_but_not_write(place: Path) -> None:
    job = make_job(place, group_access=True)
    before = tree(job.root)
    listed = as_user(job, GROUP, "list")
    assert listed.returncode == 0, listed
    assert [listed.stdout.count(word) for word in ("intact", "sealed")] == [1, 1]
    status = as_user(job, GROUP, "status", "--json")
    assert '"step":20' in status.stdout and '"actual_seconds":1.5' in status.stdout, status
    full = as_user(job, GROUP, "verify", "--full")
    assert full.returncode == 0 and full.stdout.count("every byte hashed") == 2, full
    dry = as_user(job, GROUP, "prune", "--keep-last", "1", "--dry-run")
    assert dry.returncode == 0 and "would go  epoch-0_step-10" in dry.stdout, dry
    assert tree(job.root) == before
    path = job.checkpoint(0, 20)
    assert not is_verified(job, path, read_manifest(path))


def test_group_cannot_delete(place: Path) -> None:
    job = make_job(place, group_access=True)
    before = tree(job.root)
    message = as_user(job, GROUP, "prune", "--keep-last", "1")
    assert message.returncode == 73
    assert "kept      epoch-0_step-10" in message.stdout
    assert "cannot be removed: Permission denied" in message.stdout and message.stderr == ""
    assert tree(job.root) == before


@pytest.mark.parametrize("group_access", [True, False])
@pytest.mark.parametrize(
    "command",
    [["list"], ["status"], ["verify"], ["verify", "--full"], ["save"],
     ["prune", "--keep-last", "1"]],
    ids=" ".join,
)  # fmt: skip
def test_user_without_access_gets_one_line_and_73(
    place: Path, command: list[str], group_access: bool
) -> None:
    """The group without --group-access, and others always."""
    job = make_job(place, group_access=group_access)
    group = OTHER_GROUP if group_access else GROUP
    message = as_user(job, group, command[0], *command[1:])
    assert message.returncode == 73, message
    assert message.stdout == "" and message.stderr.count("\n") == 1
    assert "no permission to read" in message.stderr and str(job.root) in message.stderr


@pytest.mark.parametrize("group_access", [True, False])
def test_run_in_another_users_directory_exits_73(place: Path, group_access: bool) -> None:
    job = make_job(place, group_access=group_access)
    before = tree(job.root)
    script = place / "train.py"
    script.write_text("")
    script.chmod(0o644)
    message = as_user(job, GROUP, "run", "--nproc", "1", "--", script)
    assert message.returncode == 73, message
    assert "error: " in message.stderr and str(job.root) in message.stderr
    assert "Traceback" not in message.stderr
    assert tree(job.root) == before
