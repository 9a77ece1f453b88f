"""torchtitan's checkpoint manager, or a stand-in of its interface where it does not import."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.integration.test_own_checkpoints import OwnJob, assert_equal, undisturbed
from tests.marks import slow
from tests.standins import framework

IS_REAL = importlib.util.find_spec("torchtitan") is not None


def titan_job(root: Path, *arguments: str) -> OwnJob:
    job = OwnJob(root, "own_titan.py", *arguments, nproc=2)
    if not IS_REAL:
        job.packages.append(framework.PLACE)
    return job


@pytest.mark.parametrize("mode", [slow("disabled"), "async"])
def test_a_notice_and_a_crash_resume_to_the_bit(tmp_path: Path, mode: str) -> None:
    packages = () if IS_REAL else (framework.PLACE,)
    expected = undisturbed(
        tmp_path / "plain", "own_titan.py", "--plain", ranks=2, packages=packages
    )
    with titan_job(tmp_path / "job", "--pause=0.3", f"--async_mode={mode}") as job:
        job.start().until_sealed()
        job.workers()[1].kill()
        job.until(lambda _: "Training starts at step 9" in job.output(), "a restart")
        job.until(lambda _: "done: 9" in job.output().split("starts at step 9")[1], "a step")
        job.process.terminate()
        assert job.wait(40) == 75, job.output()
        newest = job.seals()[0]
        assert newest.step % 8, "it was saved because of the notice"
        assert {".metadata", "__0_0.distcp", "__1_0.distcp"} <= {one.path for one in newest.files}
        job.arguments[0] = "--pause=0"
        assert job.start().wait() == 0, job.output()
        assert f"Training starts at step {newest.step + 1}" in job.output()
        assert_equal(job.root / "final.pt", expected / "final.pt")


def test_elastic_twice_is_one_line(tmp_path: Path) -> None:
    with titan_job(tmp_path / "job", "--twice") as job:
        assert job.start().wait() == 64, job.output()
        assert "elastic() was called twice" in job.output()
