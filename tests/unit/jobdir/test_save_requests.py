"""Requests of a save: how the supervisor finds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elastic_ckpt.jobdir import save_requests
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.save_requests import (
    LISTING_SECONDS,
    RequestWatch,
    ask_for_save,
    remove_requests,
)
from tests.checkpoints import open_job


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    found: list[None] = []
    real = save_requests.waiting_requests

    def record(job: JobDirectory) -> frozenset[str]:
        found.append(None)
        return real(job)

    monkeypatch.setattr(save_requests, "waiting_requests", record)
    return found


def test_directory_is_listed_when_it_changes(job: JobDirectory, listings: list[None]) -> None:
    os.utime(job.requests, ns=(0, 0))
    watch = RequestWatch(job)
    assert [watch.look(now) for now in (0.0, 0.5, 1.0)] == [frozenset()] * 3
    assert len(listings) == 1
    request = ask_for_save(job).name
    assert watch.look(1.5) == watch.look(2.0) == {request}
    assert len(listings) == 2
    os.utime(job.requests, ns=(0, 0))
    remove_requests(job, {request})
    assert watch.look(2.5) == frozenset()


def test_request_is_found_though_the_time_of_the_directory_stays(
    job: JobDirectory, listings: list[None]
) -> None:
    """A network file system may show an old one."""
    watch = RequestWatch(job)
    os.utime(job.requests, ns=(0, 0))
    watch.look(10.0)
    request = ask_for_save(job).name
    os.utime(job.requests, ns=(0, 0))
    assert watch.look(10.5) == frozenset()
    assert watch.look(10.0 + LISTING_SECONDS) == {request}


def test_missing_directory_or_a_link_has_no_requests(job: JobDirectory, tmp_path: Path) -> None:
    watch = RequestWatch(job)
    job.requests.rmdir()
    assert watch.look(0.0) == frozenset()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "save-1").touch()
    job.requests.symlink_to(tmp_path / "elsewhere")
    assert watch.look(0.5) == watch.look(0.5 + LISTING_SECONDS) == frozenset()
