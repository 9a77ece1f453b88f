"""``save``: which checkpoint answers the request."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from elastic_ckpt.checkpoint.own.files import stamps_of
from elastic_ckpt.checkpoint.own.seal import seal, write
from elastic_ckpt.cli import drill
from elastic_ckpt.cli import save as module
from elastic_ckpt.cli.progress.live_line import LiveLine
from elastic_ckpt.errors import NotAnswered
from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.run_state import RunState

RUNS = SimpleNamespace(sessionless=False, saves_itself=True)


@pytest.mark.parametrize("command", [module.command, drill.command], ids=["save", "drill"])
def test_without_a_session_nothing_is_waited_for(tmp_path: Path, command: click.Command) -> None:
    job = JobDirectory(tmp_path / "job")
    job.prepare()
    NodeRecord(
        job="tested", run_id="1", node="here", owner=ProcessIdentity.current(),
        since=time.time(), state=RunState.STARTING, sessionless=True,
    ).write(job.node_record("here"))  # fmt: skip
    with pytest.raises(NotAnswered, match="the script has created no Session"):
        command.main([str(job.root)], standalone_mode=False)
    assert not list(job.requests.iterdir()), "no request is left"


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
    monkeypatch.setattr(module, "running_records", lambda job: [RUNS])
    monkeypatch.setattr(module, "read_slots", lambda record: [])
    monkeypatch.setattr(module.time, "sleep", seal_next)
    found = module.saved_now(job, job.root, 20, LiveLine("waiting"))
    assert found.path == tmp_path / "checkpoint-30"
