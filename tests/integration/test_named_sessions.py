"""Several Sessions in one script: each has its own checkpoints, and the job is the sum of them."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.catalog import list_checkpoints, newest_intact
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.job import SCRIPTS, Job

SCRIPT = SCRIPTS / "folds.py"
STEPS = {"main": 16, "fold0": 24, "fold1": 32}

pytestmark = pytest.mark.one_torch


def folds(place: Path, *options: str, pause: float = 0.0) -> Job:
    arguments = ["--trace", str(place / "trace"), "--digest", str(place / "digest")]
    arguments += ["--pause", str(pause), *options]
    return Job(place, *arguments, script=SCRIPT)


def trained(place: Path) -> dict[str, int]:
    return dict(Counter(line.split()[0] for line in (place / "trace").read_text().splitlines()))


@pytest.mark.slow
def test_preempted_in_a_later_session_resumes_there_to_the_same_bits(tmp_path: Path) -> None:
    """The emergency save counts (75), and no step of any session is made twice."""
    with folds(tmp_path / "a") as job:
        assert job.start().wait() == 0, job.output()
    with folds(tmp_path / "b", pause=0.03) as job:
        job.start()
        # Not the 16 steps of the session before, which are shown until this one has finished one.
        job.until(lambda view: view.session == "fold0" and 4 <= view.position.step < 16, "fold0")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
        directory = JobDirectory.at(job.directory)
        seal = newest_intact(directory.session("fold0")).manifest
        # "interval" where the stop fell on a step that was just saved.
        assert seal.reason in ("emergency", "interval")
        assert (seal.session, seal.session_order) == ("fold0", 1)
        assert directory.session("fold1") not in directory.sessions()
        job.arguments += ["--pause", "0"]
        assert job.start().wait() == 0, job.output()
        assert trained(tmp_path / "b") == trained(tmp_path / "a") == STEPS
        digests = {(tmp_path / one / "digest").read_text() for one in "ab"}
        assert len(digests) == 1
        assert job.start().wait() == 0, job.output()  # finished: nothing is trained again
        assert trained(tmp_path / "b") == STEPS
        found = {view.session for view in list_checkpoints(directory)}
        assert found == {"", "fold0", "fold1"}
        assert job.view().session == "fold1"
        assert newest_intact(directory).step == 16  # the drain put each into its own session
        assert newest_intact(directory.session("fold1")).step == 32


@pytest.mark.parametrize("names", [",", "fold0,fold0"])
def test_second_session_of_the_same_name_is_refused(tmp_path: Path, names: str) -> None:
    """Instead of continuing, without a word, from what the first one has trained."""
    with folds(tmp_path, "--names", names) as job:
        assert job.start().wait() == 64, job.output()
        assert 'Session(name="head", ...)' in job.output()
    assert trained(tmp_path) == {names.split(",")[0] or "main": 16}
