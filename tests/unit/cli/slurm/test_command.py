"""The hook at the end of a batch script, with a scontrol that a test speaks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from elastic_ckpt.cli.slurm import command as cli
from elastic_ckpt.jobdir.slurm_jobs import remember_job
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.notices import slurm
from elastic_ckpt.notices.slurm import SlurmUnanswered
from tests.checkpoints import open_job


class Controller:
    """Says what scontrol says; silent for so many questions first."""

    def __init__(self) -> None:
        self.silent = 0
        self.asked: list[tuple[str, ...]] = []
        self.refusal = ""

    def __call__(self, *arguments: str) -> str:
        self.asked.append(arguments)
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
        return ("requeue", "7") in self.asked


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Controller:
    found = Controller()
    monkeypatch.setattr(slurm, "scontrol", found)
    monkeypatch.setattr(cli, "_AGAIN_SECONDS", 0.01)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return found


def hook(code: int) -> Result:
    # Not in standalone mode: what a command returns is the exit code, as in the real program.
    return CliRunner().invoke(
        cli.requeue_hook, [str(code)], catch_exceptions=False, standalone_mode=False
    )


def test_75_is_queued_again_and_is_the_exit_code(controller: Controller) -> None:
    found = hook(75)
    assert (found.return_value, controller.requeued) == (75, True)


def test_what_does_not_ask_for_it_is_not(controller: Controller) -> None:
    assert (hook(70).return_value, controller.requeued) == (70, False)


def test_a_controller_that_does_not_answer_is_asked_again(controller: Controller) -> None:
    controller.silent = 3
    found = hook(76)
    assert (found.return_value, controller.requeued) == (76, True)
    assert found.output.count("trying again") == 3


def test_one_that_never_answers_leaves_it_to_slurm(controller: Controller, monkeypatch) -> None:
    monkeypatch.setattr(cli, "_PATIENCE_SECONDS", 0.05)
    controller.silent = 10**6
    found = hook(75)
    assert found.return_value == 75 and "cannot be queued again" in found.output


def test_a_refusal_is_final_and_says_what_to_do(controller: Controller) -> None:
    controller.refusal = "Requested operation is presently disabled for job 7"
    found = hook(75)
    assert found.return_value == 75 and "submit it with --requeue" in found.output


def test_ten_runs_without_a_checkpoint_are_enough(controller: Controller, tmp_path: Path) -> None:
    job = open_job(tmp_path / "job")
    remember_job("7", job.root)
    journal = Journal(job, "here")
    journal.write("saved", step=3)
    for restart in range(9):
        for node in ("here", "there"):  # two nodes of one run
            Journal(job, node, follows=True).write("start", slurm_restarts=restart or None)
    assert (hook(76).return_value, controller.requeued) == (76, True)
    controller.asked.clear()
    journal.write("start", slurm_restarts="9")
    found = hook(76)
    assert (found.return_value, controller.requeued) == (70, False)
    assert "10 runs in a row have made no checkpoint: see elastic-ckpt status 7" in found.output
    journal.write("saved", step=4)
    assert hook(76).return_value == 76
