"""Two runs in one directory: the lock is lost, and the first run is paused and comes back."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import psutil
import pytest

from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.job import Job

STEADY = Path(__file__).parent.parent / "scripts" / "steady.py"


def second_run(first: Job) -> Job:
    """Return a run of the same job on what seems to be another node."""
    other = Job(first.root, *first.arguments, nproc=1, script=STEADY)
    other.log = first.root / "second-log"
    other.options = [*first.options, "--node-name", "n2"]
    return other


@pytest.mark.slow
def test_paused_run_that_lost_its_lock_seals_nothing_when_it_comes_back(tmp_path: Path) -> None:
    """While it lives the second run is refused; once it has been silent that one takes over."""
    calm = tmp_path / "calm"
    arguments = ["--epochs", "2", "--size", "200", "--pause", "0.05", "--calm", str(calm)]
    arguments += ["--trace", str(tmp_path / "trace")]
    first = Job(tmp_path, *arguments, nproc=1, script=STEADY)
    first.options = ["--memory-dir", "off", "--save-interval", "10"]
    with first:
        first.start("--node-name", "n1").until(
            lambda view: bool(first.checkpoints()), "a checkpoint"
        )
        (first.directory / ".elastic-ckpt" / "lock").unlink()
        with second_run(first) as second:
            assert second.start().wait(40) == 73
            assert "is alive: stop that one first" in second.output()
        paused = first.tree()
        for process in paused:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        calm.touch()
        with second_run(first) as second:
            assert second.start().wait(120) == 0, second.output()
            assert "waiting up to 20 s" in second.output()
        job = JobDirectory.at(first.directory)
        before = {path.name: read_manifest(path).run for path in scan(job)}
        assert max(before.values()) == 2
        for process in paused:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        assert first.wait(60) == 73, first.output()
        assert "has taken over" in first.output()
        assert {path.name: read_manifest(path).run for path in scan(job)} == before
