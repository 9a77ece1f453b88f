"""Snapshots that are only in memory survive every crash but the machine's."""

import contextlib
import os
import shutil
import signal
import subprocess

import pytest

from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.board import Board
from tests.job import SCRIPTS, Job, survivors
from tests.marks import slow

pytestmark = pytest.mark.one_torch

LONG = ("--epochs", "1000", "--pause", "0.05")
KEEPER = SCRIPTS / "keeper.py"
FILLER_BYTES = 8_700_000

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a small tmpfs")


@pytest.fixture
def full(tmp_path):
    """Mount 9 MiB with space for the job's own files but not for a checkpoint."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(place)], check=True)
    try:
        (place / "filler").write_bytes(bytes(FILLER_BYTES))
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def job_on(full, tmp_path, *arguments):
    job = Job(tmp_path, "--kilobytes", "1000", *arguments, nproc=1, script=KEEPER)
    job.directory = full / "job"
    return job


def only_in_memory(step):
    return lambda view: (
        view.newest_intact
        and (view.newest_intact.step, view.newest_intact.tier) == (step, "memory")
    )


def drain_failed(job, step):
    return any(e["event"] == "drain_failed" and e["data"]["step"] == step for e in job.events())


def event(job, name):
    return next(e["data"] for e in reversed(job.events()) if e["event"] == name)


def board_flag(job):
    """Return how many requests the ranks have received."""
    [record] = job_records(JobDirectory.at(job.directory))
    return Board.open(record.board, writable=False).flag


def steps(job):
    return sorted(int(path.name.split("-")[-1]) for path in job.checkpoints())


@needs_root
@pytest.mark.parametrize("victim", ["worker", slow("agent")])
def test_crash_keeps_the_snapshot_in_memory(tmp_path, full, victim):
    hold = tmp_path / "go"
    with job_on(full, tmp_path, "--hold", f"5:{hold}") as job:
        job.start().until(lambda view: only_in_memory(4)(view) and drain_failed(job, 4), "step 4")
        assert job.checkpoints() == []
        (job.workers()[0] if victim == "worker" else job.agent()).send_signal(signal.SIGKILL)
        job.until(lambda view: view.incarnation == 2 and view.workers, "a restart")
        (full / "filler").unlink()
        hold.touch()
        assert job.wait() == 0, job.output()
        assert "resumed from" in job.output() and "epoch-0_step-4\n" in job.output()
        recovery = event(job, "recovery")
        assert (recovery["step"], recovery["tier"]) == (4, "memory")
        assert recovery["total"] == pytest.approx(sum(recovery["stages"].values()))
        assert {2, 4, 13} <= set(steps(job)) and job.tiers() == []


@needs_root
def test_memory_holds_the_newest_while_the_disk_is_full(tmp_path, full):
    """And the one before, which is 8 unless a drain was reading that generation."""
    hold = tmp_path / "go"
    with job_on(full, tmp_path, "--hold", f"11:{hold}") as job:
        job.start().until(only_in_memory(10), "step 10")
        job.workers()[0].send_signal(signal.SIGKILL)
        job.until(lambda view: view.incarnation == 2 and view.workers, "a restart")
        (full / "filler").unlink()
        hold.touch()
        assert job.wait() == 0, job.output()
        assert "epoch-0_step-10\n" in job.output()
        kept = set(steps(job))
        assert {10, 13} <= kept and kept & {6, 8} and job.tiers() == []


def test_saves_go_to_the_disk_once_the_memory_tier_was_deleted(tmp_path):
    """As logind does when its user logs out, or a cleaner of /dev/shm."""
    hold = tmp_path / "go"
    with Job(tmp_path, "--hold", f"5:{hold}", nproc=1, script=KEEPER) as job:
        job.start().until(lambda view: 4 in steps(job), "step 4")
        for tier in job.tiers():
            shutil.rmtree(tier)
        hold.touch()
        assert job.wait() == 0, job.output()
        assert job.output().count("the memory tier cannot be used") == 1, job.output()
        assert {6, 8, 10, 12, 13} <= set(steps(job)), job.output()


@pytest.mark.slow
@needs_root
def test_next_run_resumes_from_the_memory_of_a_killed_one(tmp_path, full):
    hold = tmp_path / "go"
    with job_on(full, tmp_path, "--hold", f"5:{hold}") as job:
        job.start().until(lambda view: only_in_memory(4)(view) and drain_failed(job, 4), "step 4")
        doomed = job.tree()
        job.process.kill()
        assert not survivors(doomed, 10.0)
        view = job.view()
        assert (view.state, view.newest_intact.step) == ("dead", 4)
        (full / "filler").unlink()
        hold.touch()
        assert job.start().wait() == 0, job.output()
        assert "step 4 of an earlier run is in memory" in job.output()
        assert "epoch-0_step-4\n" in job.output()
        assert {2, 4, 13} <= set(steps(job)) and job.tiers() == []


@needs_root
def test_status_tells_the_truth_while_and_after_the_disk_is_full_to_the_last_byte(tmp_path, full):
    """What says so is on that disk, too: the journal, and the record of how the run ended."""
    hold, before = tmp_path / "go", tmp_path / "before"
    (full / "filler").unlink()
    holds = ["--hold", f"4:{before}", "--hold", f"5:{hold}"]
    with job_on(full, tmp_path, *holds, "--interval", "4") as job:
        job.start().until_step(3)
        fill(full)
        before.touch()
        assert job.until(lambda view: view.last_save and view.last_save.error, "an error")
        view = job.until(lambda view: view.workers and view.workers[0].step == 4, "step 4")
        assert view.exit_code == 1 and "in memory only" in view.warnings[0]
        job.process.terminate()
        job.until(lambda view: view.state == "draining" and board_flag(job), "the stop")
        hold.touch()
        assert job.wait() == 76, job.output()
        view = job.view()
        assert view.state == "preempted" and "preempted without a new checkpoint" in view.message
        assert "next: first make saves work" in job.output()


def fill(place):
    """Write to a file until the disk takes nothing more."""
    with open(place / "more", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.slow
@needs_root
def test_final_save_without_disk_space_stays_in_memory(tmp_path, full):
    with job_on(full, tmp_path, "--steps", "3", "--interval", "100") as job:
        assert job.start().wait() == 70, job.output()
        assert "the work is done, but step 3 is in memory only" in job.output()
        assert len(job.tiers()) == 1 and job.checkpoints() == []
        (full / "filler").unlink()
        assert job.start().wait() == 0, job.output()
        assert steps(job) == [3] and job.tiers() == []


@pytest.mark.slow
@needs_root
def test_notice_without_disk_space_exits_76_and_keeps_memory(tmp_path, full):
    hold = tmp_path / "go"
    with job_on(full, tmp_path, "--hold", f"4:{hold}", "--interval", "100") as job:
        job.start().until_step(3)
        job.process.terminate()
        job.until(lambda view: view.state == "draining" and board_flag(job), "the stop")
        hold.touch()
        assert job.wait() == 76, job.output()
        assert "is in memory only" in job.view().message
        kept = job.view().newest_intact
        assert kept.tier == "memory" and job.checkpoints() == []
        (full / "filler").unlink()
        assert job.start().wait() == 0, job.output()
        assert f"epoch-0_step-{kept.step}\n" in job.output()


@pytest.mark.slow
def test_preempted_job_leaves_no_memory_tier(tmp_path):
    with Job(tmp_path, "--epochs", "1000", "--pause", "0.02", nproc=2) as job:
        job.start("--save-interval", "2").until_step(5)
        assert len(job.tiers()) == 1 and event(job, "saved")["tier"] == "memory"
        job.process.terminate()
        assert job.wait() == 75, job.output()
        assert job.tiers() == []
        assert max(steps(job)) == event(job, "saved")["step"]


def test_emergency_save_goes_straight_to_disk(tmp_path):
    with Job(tmp_path, "--epochs", "1000", "--pause", "0.02", nproc=2) as job:
        job.start().until_step(3)
        job.process.terminate()
        assert job.wait() == 75, job.output()
        saved = event(job, "saved")
        assert (saved["tier"], saved["reason"]) == ("disk", "emergency")
        assert steps(job) == [saved["step"]] and job.tiers() == []


@pytest.mark.slow
@needs_root
def test_newest_snapshot_is_drained_where_a_save_does_not_fit(tmp_path, full):
    """A step takes 3 s, the notice is 2 s, and step 2 is in memory."""
    with Job(tmp_path, "--epochs", "99", "--interval", "1", "--pause", "1.5", nproc=1) as job:
        job.directory = full / "job"
        job.start("--grace", "2").until(
            lambda view: only_in_memory(2)(view) and drain_failed(job, 2), "step 2"
        )
        (full / "filler").unlink()
        job.process.terminate()
        assert job.wait(50) == 75, job.output()
        choice = event(job, "choice")
        assert choice["kind"] == "drain-newest" and choice["why"] in job.view().message
        assert max(steps(job)) == 2 and job.tiers() == []
