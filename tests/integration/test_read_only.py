"""A job directory on a read-only file system."""

import os
import subprocess
import sys

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import make_checkpoint, open_job, tree
from tests.job import TINY, environment

pytestmark = [
    pytest.mark.one_torch,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount"),
]


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
        env=environment() | {"COLUMNS": "120"},
    )  # fmt: skip


@pytest.fixture
def job(tmp_path):
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    try:
        job = open_job(place / "job")
        make_checkpoint(job, 10)
        make_checkpoint(job, 20)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        yield job
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_read_only_directory_can_be_inspected(job: JobDirectory):
    before = tree(job.root)
    for words, expected in (
        ("list", {"intact": 1, "sealed": 1}),
        ("verify", {"intact": 2}),
        ("verify --full", {"verified": 2}),
    ):
        name, *options = words.split()
        done = command(name, job.root, *options)
        assert done.returncode == 0 and done.stderr == "", (words, done)
        assert {word: done.stdout.count(word) for word in expected} == expected, words
    assert '"step":20' in command("status", job.root, "--json").stdout
    dry = command("prune", job.root, "--keep-last", "1", "--dry-run")
    assert dry.returncode == 0 and "would go  epoch-0_step-10" in dry.stdout, dry
    done = command("prune", job.root, "--keep-last", "1")
    assert done.returncode == 73 and done.stderr == "", done
    assert "cannot be removed: Read-only file system" in done.stdout
    run = command("run", "--dir", job.root, "--nproc", "1", "--", TINY)
    assert run.returncode == 73 and "Traceback" not in run.stderr, run
    assert "Read-only" in run.stderr or "no permission to write" in run.stderr
    assert tree(job.root) == before
