"""What tells a job from an earlier one in its directory: one, whoever makes it."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_ckpt.util.files import TEMPORARY
from tests.checkpoints import open_job

NODES = 8


@pytest.mark.parametrize("attempt", range(20))
def test_nodes_that_start_at_once_get_the_same(tmp_path: Path, attempt: int) -> None:
    job = open_job(tmp_path / f"job-{attempt}")
    (job.control / "identity").unlink(missing_ok=True)
    together = threading.Barrier(NODES, timeout=30)

    def start(_: int) -> str:
        together.wait()
        return job.identity()

    with ThreadPoolExecutor(NODES) as nodes:
        found = set(nodes.map(start, range(NODES)))
    assert found == {job.known_identity()}
    assert not list(job.control.glob(f"{TEMPORARY}*"))


def test_it_is_made_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    job = open_job(tmp_path / "job")
    (job.control / "identity").unlink(missing_ok=True)
    monkeypatch.setattr(os, "link", refuse)
    assert job.identity() == job.known_identity() != ""
    assert not list(job.control.glob(f"{TEMPORARY}*"))
