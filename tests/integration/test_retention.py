"""Retention of real jobs, and training on a full disk."""

import os
import re
import signal
import subprocess

import pytest

from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.verify import read_manifest, verify_full
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.retention_file import read_rule
from elastic_ckpt.policy.retention import Retention
from tests.job import SCRIPTS, Job

pytestmark = pytest.mark.one_torch

KEEPER = SCRIPTS / "keeper.py"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a small tmpfs")


def steps(job: Job) -> list[int]:
    """Verify all checkpoints in full and return their steps, newest first."""
    found = scan(JobDirectory(job.directory))
    return [verify_full(path).step for path in found]


def pruned(job: Job) -> list[int]:
    return [event["data"]["step"] for event in job.events() if event["event"] == "pruned"]


def test_command_line_retention_overrides_the_script_and_survives_a_restart(tmp_path):
    """``--keep-last 2`` keeps the newest two, and the one that the restart verified."""
    hold = tmp_path / "go"
    arguments = ("--steps", "13", "--keep-last", "9", "--hold", f"9:{hold}")
    with Job(tmp_path, *arguments, script=KEEPER) as job:
        job.options = ["--keep-last", "2", "--memory-dir", "off"]
        job.start().until(
            lambda view: view.newest_intact and view.newest_intact.step == 8, "step 8"
        )
        job.until_step(8)
        for worker in job.workers():
            worker.send_signal(signal.SIGKILL)
        job.until(lambda view: view.incarnation == 2, "a restart")
        hold.touch()
        assert job.wait() == 0, job.output()
        assert "resumed from" in job.output() and "epoch-0_step-8\n" in job.output()
        assert steps(job)[:2] == [13, 12] and len(steps(job)) == 3
        # The restart verified the checkpoint it resumed from, and it is the last verified one.
        assert steps(job)[2] == 8
        assert set(pruned(job)) <= {2, 4, 6, 10}  # the kill can cut off a line
        assert job.view().newest_intact.step == 13
        assert read_rule(JobDirectory(job.directory)) == Retention(last=2)  # for a mirror
        assert list((job.directory / ".trash").iterdir()) == []


@pytest.mark.slow
def test_script_retention_applies_without_an_option(tmp_path):
    with Job(tmp_path, "--keep-last", "1", nproc=1, script=KEEPER) as job:
        assert job.start().wait() == 0, job.output()
        found = steps(job)
        assert found[0] == 13 and len(found) <= 2
        assert set(found) | set(pruned(job)) == {2, 4, 6, 8, 10, 12, 13}


@pytest.mark.slow
def test_best_checkpoint_by_reported_loss_is_kept(tmp_path):
    with Job(tmp_path, nproc=1, script=KEEPER) as job:
        assert job.start("--keep-best", "1:loss").wait() == 0, job.output()
        assert 6 in steps(job) and steps(job)[0] == 13
        assert len(steps(job)) <= 3
        metrics = {path.name: read_manifest(path).metrics for path in job.checkpoints()}
        assert metrics["epoch-0_step-6"] == {"loss": 0.0}
        assert metrics["epoch-1_step-13"] == {"loss": 7.0}


@pytest.fixture
def small(tmp_path):
    """Mount a file system of 9 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@needs_root
def test_job_trains_on_a_full_disk_and_saves_again_when_there_is_space(tmp_path, small):
    """Checkpoints of 2 MB: four fit, the fifth is rejected before it writes anything."""
    hold = tmp_path / "go"
    with Job(
        tmp_path, "--kilobytes", "2000", "--hold", f"11:{hold}", nproc=1, script=KEEPER
    ) as job:
        job.directory = small / "job"
        job.start("--memory-dir", "off").until(
            lambda view: (
                view.state == "running" and view.workers[0].step >= 10 and view.last_save.error
            ),
            "a save that was refused, in a job that runs on",
        )
        view = job.view()
        assert re.search(r"needs about 3\.\d MB, and .* has [12]\.\d MB free", view.last_save.error)
        assert list((job.directory / ".attempts").iterdir()) == []
        assert steps(job) == [8, 6, 4, 2]
        for step in (2, 4):
            subprocess.run(["rm", "-r", job.directory / f"epoch-0_step-{step}"], check=True)
        hold.touch()
        assert job.wait() == 0, job.output()
        assert "the save at step 10 failed, training continues" in job.log.read_text()
        assert steps(job) == [13, 12, 8, 6]
        assert job.view().last_save.error in (None, "")


@pytest.mark.slow
@needs_root
def test_retention_frees_the_space_that_a_save_needs(tmp_path, small):
    """With one or two kept, every save succeeds on a disk too small for six."""
    with Job(tmp_path, "--kilobytes", "2000", "--keep-last", "1", nproc=1, script=KEEPER) as job:
        job.directory = small / "job"
        assert job.start().wait() == 0, job.output()
        assert "not saved" not in job.log.read_text(), job.output()
        saved = [event["data"]["step"] for event in job.events() if event["event"] == "saved"]
        assert saved == [2, 4, 6, 8, 10, 12, 13]
        assert steps(job)[0] == 13


@pytest.mark.slow
@needs_root
def test_last_save_on_a_full_disk_is_an_error(tmp_path, small):
    """A final one ends the job with 70, one on a notice with 76; old checkpoints stay."""
    hold = tmp_path / "go"
    arguments = ("--kilobytes", "2000", "--interval", "4", "--steps", "6", "--hold", f"5:{hold}")
    with Job(tmp_path, *arguments, nproc=1, script=KEEPER) as job:
        job.directory = small / "job"
        job.options = ["--memory-dir", "off"]
        job.start("--max-failures", "0").until(
            lambda view: view.newest_intact and view.newest_intact.step == 4, "step 4"
        )
        (small / "filler").write_bytes(b"\0" * 6_000_000)
        job.process.terminate()
        hold.touch()
        assert job.wait() == 76, job.output()
        assert job.start("--max-failures", "0").wait() == 70, job.output()
        assert re.search("error: .*needs about", job.output())
        assert steps(job) == [4]
        (small / "filler").unlink()
        assert job.start().wait() == 0, job.output()
        assert steps(job) == [6, 4]
