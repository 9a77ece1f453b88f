"""The hook at the end of a batch script, with a fake scontrol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import stamina
from click.testing import CliRunner, Result

from elastic_ckpt.cli.slurm import command as cli
from elastic_ckpt.jobdir.slurm_jobs import SlurmJob, remember_job
from elastic_ckpt.journal.events import RunStarted, Saved
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.notices import slurm
from elastic_ckpt.notices.slurm import SlurmUnanswered
from tests.checkpoints import open_job


class Controller:
    """A fake scontrol that fails to answer the first ``silent`` calls."""

    def __init__(self) -> None:
        self.silent = 0
        self.calls: list[tuple[str, ...]] = []
        self.refusal = ""

    def __call__(self, *arguments: str) -> str:
        self.calls.append(arguments)
        if self.silent:
            self.silent -= 1
            raise SlurmUnanswered("Unable to contact slurm controller (connect failure)")
        if arguments[0] == "requeue" and self.refusal:
            raise SlurmUnanswered(self.refusal)
        if "job" in arguments:
            return "JobId=7 JobState=RUNNING Reason=None Restarts=0 Partition=low"
        return "RequeueExit = (null)"

    @property
    def requeued(self) -> bool:
        return ("requeue", "7") in self.calls


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Controller]:
    found = Controller()
    monkeypatch.setattr(slurm, "scontrol", found)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    with stamina.set_testing(True, attempts=5):  # without waiting
        yield found


def hook(code: int) -> Result:
    # Not in standalone mode: the return value is the exit code, as in the real program.
    return CliRunner().invoke(
        cli.requeue_hook, [str(code)], catch_exceptions=False, standalone_mode=False
    )


def test_a_job_that_exits_with_75_is_requeued(controller: Controller) -> None:
    found = hook(75)
    assert (found.return_value, controller.requeued) == (75, True)


def test_a_job_that_does_not_ask_is_not_requeued(controller: Controller) -> None:
    assert (hook(70).return_value, controller.requeued) == (70, False)
    found = hook(0)
    assert (found.return_value, controller.requeued, found.output) == (0, False, "")


def test_an_unanswered_call_is_retried(controller: Controller) -> None:
    controller.silent = 3
    found = hook(76)
    assert (found.return_value, controller.requeued) == (76, True)
    assert found.output.count("retrying in") == 3


def test_after_the_last_retry_it_is_left_to_slurm(controller: Controller) -> None:
    controller.silent = 10**6
    found = hook(75)
    assert found.return_value == 75 and "cannot requeue job 7" in found.output


def test_a_refusal_is_not_retried(controller: Controller) -> None:
    controller.refusal = "Requested operation is presently disabled for job 7"
    found = hook(75)
    assert found.return_value == 75 and "submit it with --requeue" in found.output
    assert "retrying" not in found.output


def test_after_ten_runs_without_a_checkpoint_it_gives_up(
    controller: Controller, tmp_path: Path
) -> None:
    job = open_job(tmp_path / "job")
    remember_job("7", SlurmJob(job.root))
    journal = Journal(job, "here")
    journal.write(Saved(step=3))
    for restart in range(9):
        for node in ("here", "there"):  # two nodes of one run
            Journal(job, node, follows=True).write(
                RunStarted(slurm_restarts=str(restart) if restart else None)
            )
    assert (hook(76).return_value, controller.requeued) == (76, True)
    controller.calls.clear()
    journal.write(RunStarted(slurm_restarts="9"))
    found = hook(76)
    assert (found.return_value, controller.requeued) == (70, False)
    assert "10 consecutive runs made no checkpoint: see elastic-ckpt status 7" in found.output
    journal.write(Saved(step=4))
    assert hook(76).return_value == 76
