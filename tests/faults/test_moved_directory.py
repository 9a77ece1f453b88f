"""What a job writes to is moved, deleted or unmounted while it runs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.job import Job
from tests.waiting import until

STEADY = Path(__file__).parent.parent / "scripts" / "steady.py"

pytestmark = pytest.mark.one_torch


@pytest.fixture
def job(tmp_path: Path) -> Job:
    arguments = ["--epochs", "2", "--size", "200", "--pause", "0.05"]
    arguments += ["--calm", str(tmp_path / "calm"), "--trace", str(tmp_path / "trace")]
    return Job(tmp_path, *arguments, nproc=1, script=STEADY)


def test_crash_does_not_restart_at_step_0_where_the_checkpoints_were_moved_away(job: Job) -> None:
    job.options = ["--memory-dir", "off", "--save-interval", "60"]
    with job:
        job.start().until_step(62)
        [worker] = job.workers()
        archive = job.directory.rename(job.root / "archive")
        worker.kill()
        assert job.wait() == 73, job.output()
        assert "the checkpoint of step 60 is not there any more" in job.output()
        view = job.view()
        assert view.state == "failed" and "put the directory back" in view.advice
        shutil.rmtree(job.directory)
        archive.rename(job.directory)
        (job.root / "calm").touch()
        assert job.start().wait() == 0, job.output()
        assert "from step 60" in job.output()


@pytest.mark.slow
def test_run_whose_directory_is_moved_saves_in_a_new_one_that_tells_the_truth(job: Job) -> None:
    job.options = ["--save-interval", "10"]
    with job:
        job.start().until_step(12)
        job.directory.rename(job.root / "archive")
        job.until(lambda view: view.state == "running" and bool(job.checkpoints()), "a new one", 30)
        assert "was moved, deleted or unmounted" in job.output()
        [worker] = job.workers()
        worker.kill()
        job.until(lambda view: view.incarnation == 2 and bool(view.workers), "a restart")
        (job.root / "calm").touch()
        assert job.wait() == 0, job.output()
        assert job.view().state == "finished"


@pytest.mark.slow
def test_crash_after_a_clean_up_of_tmp_is_followed_by_a_restart(job: Job) -> None:
    job.options = ["--save-interval", "10"]
    temporary = Path(tempfile.mkdtemp(dir="/tmp", prefix="t"))  # a socket's path must be short
    try:
        job.prefix = ["env", f"TMPDIR={temporary}"]
        with job:
            job.start().until_step(12)
            for path in temporary.iterdir():
                shutil.rmtree(path)
            [worker] = job.workers()
            worker.kill()
            job.until(lambda view: view.incarnation == 2 and bool(view.workers), "a restart")
            (job.root / "calm").touch()
            assert job.wait() == 0, job.output()
    finally:
        shutil.rmtree(temporary)


def is_removed(directory: Path) -> bool:
    """Remove it; again, if something was written there meanwhile."""
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


def test_saves_go_to_the_disk_when_the_memory_tier_is_deleted(job: Job) -> None:
    job.options = ["--save-interval", "10"]
    with job:
        job.start().until(lambda view: bool(job.checkpoints()), "a checkpoint")
        [tier] = job.tiers()
        until(lambda: is_removed(tier), "the tier's end")
        (job.root / "calm").touch()
        assert job.wait() == 0, job.output()
        assert job.output().count("the memory tier cannot be used") == 1
        assert job.view().newest_on_disk.step == 200


def test_notice_where_the_disk_was_unmounted_is_not_followed_by_a_start_at_step_0(job: Job) -> None:
    """A link to another mount stands for the empty mount point."""
    job.options = ["--memory-dir", "off", "--save-interval", "60"]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere, job:
        job.start().until_step(62)
        job.directory.rename(job.root / "archive")
        job.directory.symlink_to(elsewhere)
        job.supervisor().terminate()
        assert job.wait() == 73, job.output()
        assert "the checkpoint of step 60 is not there any more" in job.output()
        assert not list(Path(elsewhere).glob("epoch-*"))
