"""``save``: which checkpoint answers the request."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic_ckpt.checkpoint.own.files import stamps_of
from elastic_ckpt.checkpoint.own.seal import seal, write
from elastic_ckpt.cli import save as module
from elastic_ckpt.cli.progress.live_line import LiveLine
from elastic_ckpt.jobdir.paths import JobDirectory


def test_what_the_script_wrote_before_the_request_does_not_answer_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sealed a second later than it is written, or more."""
    job = JobDirectory(tmp_path / "job")
    job.prepare()
    steps = [20, 25, 30]  # sealed before the request, written before it, written because of it

    def seal_next(_: float = 0.0) -> None:
        step = steps.pop(0)
        path = tmp_path / f"checkpoint-{step}"
        path.write_text("weights")
        if step < 30:
            long_ago = time.time_ns() - 10**10
            os.utime(path, ns=(long_ago, long_ago))
        stamps = stamps_of(path)
        write(job, seal(path, stamps, number=step, step=step, run=1, incarnation=1))

    seal_next()
    monkeypatch.setattr(module, "running_records", lambda job: [SimpleNamespace()])
    monkeypatch.setattr(module, "read_slots", lambda record: [])
    monkeypatch.setattr(module.time, "sleep", seal_next)
    found = module.saved_now(job, job.root, 20, LiveLine("waiting"))
    assert found.path == tmp_path / "checkpoint-30"
