"""The thread that watches the script's own checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.own_saves import OwnSaves
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.supervisor.saves import own_watch
from elastic_ckpt.supervisor.saves.own_watch import OwnWatch
from tests.waiting import until


def test_storage_that_fails_before_a_start_is_tried_again_and_then_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JobDirectory(tmp_path / "job")
    job.prepare()
    rules = OwnSaves((str(tmp_path / "ckpt.pt"),))
    journal = Journal(job, "here")
    watch = OwnWatch(job, rules, 1, Retention(), journal, lambda _: None, lambda: None)
    monkeypatch.setattr(own_watch, "RETRY_SECONDS", (0.01, 0.01))
    answers: list[str | OSError] = [OSError(5, "Input/output error")] * 5 + ["/there"]

    def prepare(_: object) -> str:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(watch._keeper, "prepare", prepare)
    watch.start()
    try:
        watch.prepare(lambda: False)
        until(lambda: watch.prepared)
        assert "Input/output error; fix the storage" in watch.failed
        watch.prepare(lambda: False)
        until(lambda: watch.prepared)
        assert watch.failed == ""
        assert answers == []
    finally:
        watch.close(5)


def test_two_runs_do_not_watch_the_same_output(tmp_path: Path, monkeypatch) -> None:
    """The second one would set aside what the first one's script is writing."""
    monkeypatch.setattr(own_watch, "RETRY_SECONDS", (0.01,))
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    watches = []
    try:
        for name, output in (("one", "out"), ("two", "link"), ("three", "other")):
            job = JobDirectory(tmp_path / name)
            job.prepare()
            rules = OwnSaves((str(tmp_path / output / "checkpoint-*"),))
            journal = Journal(job, "here")
            watch = OwnWatch(job, rules, 1, Retention(), journal, lambda _: None, lambda: None)
            watches.append(watch)
            watch.start()
            watch.prepare(lambda: False)
            until(lambda watch=watch: watch.prepared)
        one, two, three = watches
        assert (one.failed, three.failed) == ("", "")
        assert "another run on this machine watches" in two.failed
        assert two.failed_code == 73
        one.close(5)
        two.prepare(lambda: False)
        until(lambda: two.prepared)
        assert two.failed == ""
    finally:
        for watch in watches:
            watch.close(5)
