"""Requests of a save: how the supervisor finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from elastic_ckpt.util.change_bell import ChangeBell
from elastic_ckpt.util.directory_stamp import Stamp
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


@pytest.fixture
def watch(job: JobDirectory) -> Iterator[RequestWatch]:
    watch = RequestWatch(job)
    yield watch
    watch.close()


@pytest.fixture
def stamps(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each call to the file system while nothing changes."""
    found: list[None] = []
    real = save_requests.stamp_of

    def record(directory: Path) -> Stamp:
        found.append(None)
        return real(directory)

    monkeypatch.setattr(save_requests, "stamp_of", record)
    return found


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on what is changed was changed by another host: no bell rings."""
    monkeypatch.setattr(ChangeBell, "rang", lambda bell: False)


def looks(watch: RequestWatch, first: float, last: float) -> list[frozenset[str]]:
    """Look each half second, as the supervisor does."""
    return [watch.look(first + number / 2) for number in range(int(2 * (last - first)))]


def test_idle_watch_makes_one_call_a_second(
    watch: RequestWatch, listings: list[None], stamps: list[None]
) -> None:
    looks(watch, 0.0, 10.0)
    listings.clear()
    stamps.clear()
    assert set(looks(watch, 10.0, 30.0)) == {frozenset()}
    assert (len(stamps), len(listings)) == (20, 0)


def test_request_of_this_host_is_found_by_the_next_look(
    job: JobDirectory, watch: RequestWatch
) -> None:
    looks(watch, 0.0, 10.0)
    assert watch.look(10.0) == frozenset()
    request = ask_for_save(job).name
    assert watch.look(10.01) == watch.look(10.02) == {request}
    remove_requests(job, {request})
    assert watch.look(10.03) == frozenset()


def test_request_of_another_host_is_found_within_a_second(
    job: JobDirectory, watch: RequestWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(watch, 0.0, 10.0)
    elsewhere(monkeypatch)
    request = ask_for_save(job).name
    assert {request} in looks(watch, 10.0, 11.5)
    remove_requests(job, {request})
    assert looks(watch, 11.5, 13.0)[-1] == frozenset()


def test_two_changes_in_one_tick_of_a_slow_clock_are_both_found(
    job: JobDirectory, watch: RequestWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(watch, 0.0, 10.0)
    elsewhere(monkeypatch)
    ticks = (10.0, 12.0)  # of a clock with steps of two seconds
    now = [10.0]
    stamp = lambda _: (max(tick for tick in ticks if tick <= now[0]),)  # noqa: E731
    monkeypatch.setattr(save_requests, "stamp_of", stamp)
    assert watch.look(now[0]) == frozenset()
    request = ask_for_save(job).name  # in the same tick
    now[0] = 11.0
    assert watch.look(now[0]) == {request}


def test_request_is_found_where_directories_have_no_times(
    job: JobDirectory, watch: RequestWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(monkeypatch)
    monkeypatch.setattr(save_requests, "stamp_of", lambda directory: (1,))
    looks(watch, 0.0, 10.0)
    request = ask_for_save(job).name
    assert watch.look(11.0) == frozenset()
    assert {request} in looks(watch, 12.0, 13.0 + LISTING_SECONDS)


def test_watch_without_inotify_looks_each_time(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChangeBell, "hang", lambda bell: None)
    watch = RequestWatch(job)
    looks(watch, 0.0, 10.0)
    request = ask_for_save(job).name
    assert watch.look(10.0) == {request}
    watch.close()


@pytest.mark.parametrize("replace", [Path.rmdir, lambda path: path.rename(f"{path}-old")])
def test_request_in_a_directory_that_took_the_place_is_found(
    job: JobDirectory, watch: RequestWatch, replace: Callable[[Path], object]
) -> None:
    looks(watch, 0.0, 10.0)
    replace(job.requests)
    assert watch.look(10.0) == frozenset()
    request = ask_for_save(job).name
    assert watch.look(10.5) == {request}
    remove_requests(job, {request})
    assert watch.look(10.6) == frozenset()


def test_missing_directory_or_a_link_has_no_requests(
    job: JobDirectory, watch: RequestWatch, tmp_path: Path
) -> None:
    job.requests.rmdir()
    assert watch.look(0.0) == frozenset()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "save-1").touch()
    job.requests.symlink_to(tmp_path / "elsewhere")
    assert watch.look(0.5) == watch.look(0.5 + LISTING_SECONDS) == frozenset()
