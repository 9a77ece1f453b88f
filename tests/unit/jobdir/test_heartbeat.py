"""The heartbeat of a node: written over in place, for it is written all the time."""

from __future__ import annotations

import os

from elastic_ckpt.jobdir.heartbeat import (
    Heartbeat,
    read_heartbeat,
    renew_heartbeat,
    write_heartbeat,
)
from elastic_ckpt.jobdir.paths import JobDirectory

SHORT = Heartbeat(1.0)
LONG = Heartbeat(1796006843.123456, 10**11, 10**11, 10**11)


def test_heartbeat_is_written_over_a_longer_one(job: JobDirectory) -> None:
    write_heartbeat(job, "here", LONG)
    inode = job.heartbeat("here").stat().st_ino
    renew_heartbeat(job, "here", SHORT)
    assert read_heartbeat(job, "here") == SHORT
    renew_heartbeat(job, "here", LONG)
    assert read_heartbeat(job, "here") == LONG
    assert job.heartbeat("here").stat().st_ino == inode


def test_heartbeat_that_was_removed_or_became_a_pipe_is_written_again(job: JobDirectory) -> None:
    renew_heartbeat(job, "here", SHORT)
    assert read_heartbeat(job, "here") == SHORT
    job.heartbeat("here").unlink()
    os.mkfifo(job.heartbeat("here"))
    renew_heartbeat(job, "here", LONG)
    assert read_heartbeat(job, "here") == LONG
