"""The findings of ``elastic-ckpt doctor`` for storage that refuses, is slow, or does not answer."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import psutil
import pytest

from elastic_ckpt.cli.doctor import directory as directory_findings
from elastic_ckpt.cli.doctor import storage as storage_findings
from elastic_ckpt.cli.doctor.directory import CheckedPath, check_directory, inspect_directory
from elastic_ckpt.cli.doctor.findings import Finding
from elastic_ckpt.cli.doctor.platform import Grace
from elastic_ckpt.cli.doctor.storage import check_storage
from elastic_ckpt.cli.doctor.storage_trial import (
    TRIALS,
    ClockSkew,
    TrialEvent,
    TrialResult,
    WriteSpeed,
)
from elastic_ckpt.jobdir.prediction_file import write_predictor
from elastic_ckpt.policy.prediction import Predictor, Route
from elastic_ckpt.util import in_child
from tests.checkpoints import make_checkpoint, open_job, tree

pytestmark = pytest.mark.one_torch

GB = 10**9
GRACE = Grace(30.0, "from --grace")


@pytest.fixture(autouse=True)
def no_child_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storage_findings, "MAX_BYTES", 8 * 2**20)
    monkeypatch.setattr(storage_findings, "REMOVAL_SECONDS", 60.0)
    monkeypatch.setattr(in_child, "PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(in_child, "KILL_SECONDS", 60.0)
    before = psutil.Process().children()  # multiprocessing's own, of a test in the same process
    yield
    assert psutil.Process().children() == before


def place_at(path: Path, **changes: Any) -> CheckedPath:
    return msgspec.structs.replace(CheckedPath(str(path), str(path), 100 * GB), **changes)


def found_in(place: CheckedPath, grace: Grace = GRACE) -> dict[str, Finding]:
    return {one.what: one for one in check_storage(place, grace, lambda text: None)}


def refuse(number: int) -> Callable[..., NoReturn]:
    def call(*arguments: Any, **named: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


def hang(*arguments: Any, **named: Any) -> None:
    time.sleep(600)


def test_a_good_storage_is_tested_in_another_process_and_left_unchanged(tmp_path: Path) -> None:
    told: list[str] = []
    found = list(check_storage(place_at(tmp_path), GRACE, told.append))
    assert {one.state for one in found} == {"ok"}
    assert [one.partition(" left")[0].rpartition(",")[0] for one in told] == [
        "writing: 50 %, 4.2 MB of 8.4 MB", "writing: 99 %, 8.4 MB of 8.4 MB",
    ]  # fmt: skip
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("call", "what", "number"),
    [("fsync", "fsync", errno.EINVAL), ("rename", "rename", errno.ENOSYS)],
)
def test_a_storage_that_refuses_a_call_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, what: str, number: int
) -> None:
    monkeypatch.setattr(os, call, refuse(number))
    found = found_in(place_at(tmp_path))
    assert (found[what].state, found[what].text) == ("problem", os.strerror(number))
    assert "another file system" in found[what].todo
    assert found["O_EXCL"].state == "ok"  # the rest is tried all the same
    assert tree(tmp_path) == {}


def test_missing_locks_are_a_warning_and_broken_locks_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    found = found_in(place_at(tmp_path))["locks"]
    assert found.state == "warning" and "marker files" in found.todo
    monkeypatch.setattr(fcntl, "flock", lambda *given: None)
    assert found_in(place_at(tmp_path))["locks"].state == "problem"


def test_a_storage_that_does_not_answer_is_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_findings, "TRIAL_SECONDS", 1.0)
    monkeypatch.setattr(in_child, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(os, "fsync", hang)
    found = found_in(place_at(tmp_path))
    ((what, problem),) = found.items()
    assert what in ("fsync", "writing")  # this machine may be slow, too
    assert (problem.state, problem.text) == ("problem", "did not answer within 1 s")
    assert f"{tmp_path}/.elastic-ckpt-trial-" in problem.todo
    assert tree(tmp_path) == {}  # it did answer to that


def test_a_hang_during_the_measurement_keeps_the_earlier_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_findings, "TRIAL_SECONDS", 2.0)
    monkeypatch.setattr(in_child, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("elastic_ckpt.checkpoint.disk.hashed_file.HashedFile.sync", hang)
    found = found_in(place_at(tmp_path))
    *_, problem = found.values()
    assert problem.text == "did not answer within 2 s" and "write speed" not in found
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("number", "todo"),
    [(errno.EACCES, "run as its owner"), (errno.EROFS, "mount it for writing"),
     (errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space, or raise the quota")],
)  # fmt: skip
def test_an_unwritable_directory_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, todo: str
) -> None:
    monkeypatch.setattr(os, "mkdir", refuse(number))
    found = found_in(place_at(tmp_path))
    assert found["writing"].text == f"{tmp_path} is not writable: {os.strerror(number)}"
    assert found["writing"].todo.startswith(todo)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_problem_and_what_needs_room_is_untried(
    tmp_path: Path, storage: Callable[..., None], number: int
) -> None:
    why = os.strerror(number)
    storage(*(TrialResult(what, why, number) for what in ("fsync", "rename", "writing")),
            TrialResult("locks"))  # fmt: skip
    found = list(check_storage(place_at(tmp_path), GRACE, lambda text: None))
    assert [(one.what, one.state) for one in found] == [
        ("writing", "problem"), ("fsync", "untried"), ("rename", "untried"), ("locks", "ok"),
    ]  # fmt: skip
    assert "another file system" not in f"{found}"


def test_an_interrupted_test_leaves_nothing(tmp_path: Path) -> None:
    def stop(text: str) -> NoReturn:
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(check_storage(place_at(tmp_path), GRACE, stop))
    assert tree(tmp_path) == {}


def test_at_most_a_quarter_of_the_free_space_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def spy(place: Path, most_bytes: int, seconds: float) -> Iterator[TrialEvent]:
        asked.append(most_bytes)
        yield from ()

    monkeypatch.setattr(storage_findings, "try_storage", spy)
    monkeypatch.setattr(storage_findings, "MAX_BYTES", 256 * 2**20)
    for free in (10**12, 400 * 2**20, 3):
        list(storage_findings.run_trial(place_at(tmp_path, free_bytes=free)))
    assert asked == [256 * 2**20, 100 * 2**20, 0]


def test_a_nearly_full_disk_is_not_written_to(tmp_path: Path) -> None:
    found = found_in(place_at(tmp_path, free_bytes=3_000_000))
    assert found["write speed"].state == "warning"
    assert found["write speed"].text == "not measured: only 3.0 MB free"
    assert found["locks"].state == "ok" and "emergency save" not in found


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the trial by one that yields these events."""

    def say(*words: TrialEvent) -> None:
        monkeypatch.setattr(storage_findings, "run_trial", lambda place: (word for word in words))

    return say


def test_the_speed_gives_the_largest_state_that_fits_the_grace(
    tmp_path: Path, storage: Callable[..., None]
) -> None:
    storage(WriteSpeed(GB, 2.0, 0.1))
    found = found_in(place_at(tmp_path))
    assert (found["write speed"].value, found["write speed"].unit) == (GB / 2, "bytes/s")
    assert found["write speed"].text.startswith("500.0 MB/s by one writer with fsync (1.0 GB in")
    # 30 s at that speed are 15 GB; a first prediction is half as long again.
    assert found["emergency save"].value == pytest.approx(10 * GB)
    assert found["emergency save"].text.startswith("up to 10.0 GB fit into the grace of 30 s")


@pytest.mark.parametrize(("size", "state"), [(9 * GB, "ok"), (11 * GB, "problem")])
def test_a_checkpoint_is_compared_with_the_grace(
    tmp_path: Path, storage: Callable[..., None], size: int, state: str
) -> None:
    storage(WriteSpeed(GB, 2.0, 0.1))
    found = found_in(place_at(tmp_path, newest="epoch-0_step-1", state_bytes=size))
    assert found["emergency save"].state == state
    assert found["emergency save"].value == pytest.approx(3 * size / GB)
    found = found_in(place_at(tmp_path, state_bytes=size), Grace(0.1, "from --grace"))
    assert found["emergency save"].state == "problem"


def test_a_small_state_is_predicted_by_the_first_chunk(
    tmp_path: Path, storage: Callable[..., None]
) -> None:
    storage(WriteSpeed(GB, 5.0, 0.1))
    found = found_in(place_at(tmp_path, state_bytes=1000), Grace(1.0, ""))
    assert found["emergency save"].state == "ok"


def test_the_jobs_own_saves_replace_the_measurement(
    tmp_path: Path, storage: Callable[..., None]
) -> None:
    storage(WriteSpeed(GB, 2.0, 0.1))
    found = found_in(place_at(tmp_path, state_bytes=GB, saved_seconds=31.0))
    assert found["emergency save"].state == "problem"
    assert "takes up to 31 s by the job's own saves" in found["emergency save"].text
    storage()  # nothing was measured
    assert found_in(place_at(tmp_path, state_bytes=GB)).keys() == set()
    found = found_in(place_at(tmp_path, state_bytes=GB, saved_seconds=29.0))
    assert found["emergency save"].state == "ok"


@pytest.mark.parametrize(
    ("seconds", "state", "says"),
    [(4.0, "ok", ""), (6.0, "warning", "6 s ahead of"), (-7000.0, "warning", "h behind")],
)
def test_the_storages_clock(
    tmp_path: Path, storage: Callable[..., None], seconds: float, state: str, says: str
) -> None:
    storage(ClockSkew(-3 * 3600.0 if says == "h behind" else seconds))
    found = found_in(place_at(tmp_path))["file times"]
    assert found.state == state and says in found.text


def test_every_storage_test_has_messages(tmp_path: Path, storage: Callable[..., None]) -> None:
    storage(*(TrialResult(what) for what in TRIALS))
    assert found_in(place_at(tmp_path)).keys() == set(TRIALS)
    names = [*TRIALS, "writing"]
    storage(*(TrialResult(what, "no", 5) for what in names))
    failed = found_in(place_at(tmp_path))
    assert all(failed[what].todo and failed[what].state != "ok" for what in names)


# What there is before anything is tried


def look(directory: Path) -> CheckedPath:
    found = inspect_directory(directory)
    assert isinstance(found, CheckedPath), found
    return found


def test_the_newest_intact_checkpoint_is_reported(tmp_path: Path) -> None:
    job = open_job(tmp_path / "job")
    make_checkpoint(job, 10)
    newest = make_checkpoint(job, 20)
    make_checkpoint(job, 30).joinpath("modeling/model.safetensors").unlink()
    found = look(job.root)
    assert found.newest == newest.name and found.exists
    assert 1000 < found.state_bytes < 10_000 and found.free_bytes > 0
    assert found.saved_seconds is None
    predictor = Predictor()
    predictor.observe(Route.DISK, 10 * found.state_bytes, 20.0)
    write_predictor(job, predictor)
    assert look(job.root).saved_seconds == pytest.approx(30.0)


def test_checkpoints_of_which_none_is_intact_are_a_problem(tmp_path: Path) -> None:
    job = open_job(tmp_path / "job")
    made = [make_checkpoint(job, step) for step in (10, 20)]
    for one in made:
        one.joinpath("modeling/model.safetensors").unlink()
    first, _ = check_directory(look(job.root))
    assert (first.state, first.what) == ("problem", "directory")
    assert first.text == (
        f"{job.root}: none of its checkpoints is intact (2 damaged): a start would end with 65"
    )
    make_checkpoint(job, 5)
    assert next(iter(check_directory(look(job.root)))).state == "ok"


def test_a_missing_directory_is_tested_in_its_parent(tmp_path: Path) -> None:
    found = look(tmp_path / "a" / "b")
    assert (found.root, found.tested) == (str(tmp_path / "a" / "b"), str(tmp_path))
    assert not found.exists and tree(tmp_path) == {}
    (first, _) = check_directory(found)
    assert first.text == f"{tmp_path}/a/b does not exist yet; tested {tmp_path}"
    assert first.state == "untried", "so that it is said without -v"


def test_a_path_that_is_not_a_directory_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        found = inspect_directory(path)
        assert isinstance(found, Finding) and found.state == "problem"
        assert found.text.endswith(f"{tmp_path}/file is not a directory")
    (tmp_path / "loop").symlink_to("loop")
    found = inspect_directory(tmp_path / "loop")
    assert isinstance(found, Finding) and "loop" in found.text


def test_a_directory_that_does_not_answer_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_findings, "INSPECT_SECONDS", 0.3)
    monkeypatch.setattr(in_child, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(directory_findings, "newest_of_job", hang)
    found = inspect_directory(tmp_path)
    assert isinstance(found, Finding) and found.state == "problem"
    assert found.text == f"{tmp_path}: did not answer within 0.3 s"


@pytest.mark.parametrize(
    ("free", "state", "text"),
    [
        (10 * GB, "ok", "10.0 GB free: room for 3 more checkpoints"),
        (5 * GB, "warning", "5.0 GB free, and a save needs about 3.0 GB"),
        (2 * GB, "problem", "2.0 GB free, and a save needs about 3.0 GB"),
    ],
)
def test_free_space(tmp_path: Path, free: int, state: str, text: str) -> None:
    place = place_at(tmp_path, free_bytes=free, newest="epoch-0_step-1", state_bytes=3 * GB)
    found = list(check_directory(place))[1]
    assert (found.state, found.text, found.value) == (state, text, free)


def test_free_space_without_a_checkpoint_is_ok(tmp_path: Path) -> None:
    assert list(check_directory(place_at(tmp_path, free_bytes=5)))[1].state == "ok"
