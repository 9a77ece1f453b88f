"""Ranks that notice a preemption at different points save the same step."""

import pytest

from tests.job import Job, used_samples
from tests.marks import slow

pytestmark = pytest.mark.one_torch

EPOCHS, LAST_OF_EPOCH = 3, 13
ARGUMENTS = (
    "--epochs",
    str(EPOCHS),
    "--workers",
    "2",
    "--pause",
    "0.01",
)  # so that it does not finish first


def job_in(directory, *arguments) -> Job:
    return Job(
        directory, *ARGUMENTS, *arguments,
        *("--trace", str(directory / "trace"), "--digest", str(directory / "digest")),
    )  # fmt: skip


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calm")
    with job_in(directory) as job:
        assert job.start().wait(120) == 0, job.output()
    return (directory / "digest").read_text(), used_samples(directory / "trace", 2)


@pytest.mark.parametrize(
    ("notice", "arguments"),
    [
        slow("3:step:0", ()),
        slow("3:step:1", ("--slow-rank", "0", "--pause", "0.3")),  # one rank is ahead
        slow("4:step:0", ("--pause", "1.0")),  # a long step
        slow(f"{LAST_OF_EPOCH}:step:0", ()),  # at the last batch of an epoch
        slow(f"{LAST_OF_EPOCH}:step:1", ("--workers", "0")),
        slow(f"{LAST_OF_EPOCH}:eval:0", ("--slow-eval", "1.0")),  # one is evaluating
        (f"{LAST_OF_EPOCH}:eval:1", ("--slow-eval", "1.0", "--interruptible")),
        (f"{EPOCHS * LAST_OF_EPOCH}:step:0", ()),  # at the job's very last step
    ],
)
def test_all_ranks_save_the_same_step(tmp_path, calm, notice, arguments):
    stop_file = tmp_path / "noticed"
    with job_in(tmp_path, *arguments, "--notice", notice, "--notice-file", str(stop_file)) as job:
        code = job.start().wait(60)
        assert stop_file.exists()
        step = int(notice.split(":")[0])
        if code == 0:
            # The notice came after the last step: the job is finished, not preempted.
            assert step == EPOCHS * LAST_OF_EPOCH
        else:
            assert code == 75, job.output()
            view = job.view()
            assert view.newest_intact.step >= step  # later steps depend on when the signal arrived
            assert view.newest_intact.reason == "emergency"
            job.arguments += ["--pause", "0", "--slow-eval", "0"]
            assert job.finish() == 0, job.output()
    digest, samples = calm
    assert (tmp_path / "digest").read_text() == digest
    assert used_samples(tmp_path / "trace", 2) == samples


@pytest.mark.slow
def test_three_preemptions_in_a_row(tmp_path, calm):
    go = tmp_path / "go"
    with job_in(tmp_path, "--pause", "0.2", "--calm", str(go)) as job:
        steps = []
        for _ in range(3):
            job.start().until_training()
            job.process.terminate()
            job.process.terminate()  # a repeated notice is ignored
            assert job.wait(60) == 75, job.output()
            steps.append(job.view().newest_intact.step)
        go.touch()
        assert job.finish() == 0, job.output()
        assert steps == sorted(steps)
        assert job.view().restarts.preemptions == 3
    assert (tmp_path / "digest").read_text() == calm[0]


@pytest.mark.slow
def test_notice_before_the_first_step_keeps_the_previous_checkpoint(tmp_path):
    with job_in(tmp_path, "--pause", "0.2") as job:
        job.start()
        job.until(lambda view: view.state == "starting" and view.incarnation == 1, "launch")
        job.process.terminate()
        assert job.wait(60) == 76, job.output()  # no checkpoint exists
        job.start().until_step(2)
        job.process.terminate()
        assert job.wait(60) == 75, job.output()
        names = [path.name for path in job.checkpoints()]
        job.start()
        job.until(lambda view: view.incarnation == 3, "launch")
        job.process.terminate()
        code = job.wait(60)
        assert code == 75, job.output()
        if job.view().position.step == int(names[0].split("-")[-1]):
            assert [path.name for path in job.checkpoints()] == names


@pytest.mark.slow
def test_crash_after_a_notice_does_not_restart(tmp_path):
    with job_in(tmp_path, "--pause", "0.5") as job:
        job.start().until_step(1)
        worker = job.workers()[1]
        job.process.terminate()
        job.until(lambda view: view.state == "draining", "draining")
        worker.kill()
        assert job.wait(50) == 76, job.output()
        assert job.view().incarnation == 1


@pytest.mark.slow
def test_save_on_request_and_by_the_clock(tmp_path):
    import subprocess
    import sys

    from tests.job import environment

    go = tmp_path / "go"
    with job_in(tmp_path, "--pause", "0.2", "--calm", str(go)) as job:
        job.start().until_step(2)
        saved = subprocess.run(
            [sys.executable, "-m", "elastic_ckpt", "save", str(job.directory)],
            capture_output=True, text=True, timeout=60, env=environment(), check=False,
        )  # fmt: skip
        assert saved.returncode == 0, saved.stderr
        assert saved.stdout.strip().startswith(str(job.directory / "epoch-"))
        assert job.view().newest_intact.reason == "manual"
        job.process.terminate()
        assert job.wait(60) == 75
        job.start("--save-interval", "0.5s")
        job.until(lambda view: len(job.checkpoints()) >= 4, "saves by the clock", 60)
        go.touch()
        assert job.wait(120) == 0
    events = [event for event in job.events() if event["event"] == "saved"]
    assert {event["data"]["reason"] for event in events} >= {"manual", "emergency"}


@pytest.mark.slow
def test_notice_without_enough_time_exits_76_and_leaves_no_files(tmp_path):
    with job_in(tmp_path, "--pause", "5") as job:
        job.start("--grace", "1").until_step(0)
        job.process.terminate()
        assert job.wait(50) == 76, job.output()
