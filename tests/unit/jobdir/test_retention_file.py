"""The rule of a session's script, as the mirror finds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.jobdir.retention_file import note_rule, read_rule
from elastic_ckpt.policy.retention import Retention
from tests.checkpoints import open_job


def test_each_session_has_its_own(tmp_path: Path) -> None:
    job = open_job(tmp_path / "job")
    assert read_rule(job) == Retention()
    note_rule(job, Retention(last=2, best=1, metric="loss"))
    note_rule(job.session("fold0"), Retention(every=100))
    assert read_rule(job) == Retention(last=2, best=1, metric="loss")
    assert read_rule(job.session("fold0")) == Retention(every=100)
    note_rule(job, Retention())
    assert not read_rule(job)


@pytest.mark.parametrize("data", [b"", b"{", b'{"last": "all"}', b'{"last": -1}', b"x" * 5000])
def test_what_is_no_rule_keeps_all(tmp_path: Path, data: bytes) -> None:
    job = open_job(tmp_path / "job")
    (job.control / "retention.json").write_bytes(data)
    assert read_rule(job) == Retention()


def test_a_directory_that_is_gone_is_no_error(tmp_path: Path) -> None:
    job = open_job(tmp_path / "job")
    job.control.rename(tmp_path / "away")
    note_rule(job, Retention(last=1))
    assert not job.control.exists()
