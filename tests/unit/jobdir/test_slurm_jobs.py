"""From a job's number to its directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elastic_ckpt.jobdir import slurm_jobs
from elastic_ckpt.jobdir.slurm_jobs import (
    SlurmJob,
    find_job,
    has_jobs,
    is_job_number,
    remember_job,
    task_numbers,
)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


def test_a_job_is_found_by_its_number(home: dict[str, str], tmp_path: Path) -> None:
    assert not has_jobs(home)
    submitted = SlurmJob(tmp_path / "a b", "cd / && elastic-ckpt slurm submit job.toml")
    remember_job("12", submitted, home)
    remember_job("12_3", SlurmJob(tmp_path / "task-3"), home)
    assert find_job("12", home) == submitted
    assert find_job("12_3", home) == SlurmJob(tmp_path / "task-3")
    assert find_job("13", home) is None and has_jobs(home)


def test_a_record_of_an_earlier_version_has_the_directory_alone(home, tmp_path: Path) -> None:
    remember_job("1", SlurmJob(tmp_path), home)
    (tmp_path / ".local/state/elastic-ckpt/slurm/2").write_bytes(b"/a/\xff")
    assert find_job("2", home) == SlurmJob(Path(os.fsdecode(b"/a/\xff")))


def test_a_task_is_found_by_the_record_of_its_array(home, tmp_path: Path) -> None:
    remember_job("12", SlurmJob(tmp_path, "submit job.toml -- --array=1-8%2", "1-8%2"), home)
    assert find_job("12_3", home) == SlurmJob(
        tmp_path / "task-3", "submit job.toml -- --array=1-8%2 --array=3"
    )
    remember_job("13", SlurmJob(tmp_path), home)
    assert find_job("13_3", home) is None


@pytest.mark.parametrize(
    ("array", "tasks"),
    [("1-3", [1, 2, 3]), ("0-6:3%2", [0, 3, 6]), ("7,1-2", [7, 1, 2]), ("x", []), ("", []),
     ("1-3:0", [1, 2, 3])],
)  # fmt: skip
def test_tasks_of_an_array(array: str, tasks: list[int]) -> None:
    assert task_numbers(array) == tasks


@pytest.mark.parametrize("text", ["", "x", "../12", "12/..", "1_2_3", "-1", "१२"])
def test_invalid_job_numbers(home: dict[str, str], tmp_path: Path, text: str) -> None:
    assert not is_job_number(text)
    remember_job(text, SlurmJob(tmp_path), home)
    assert find_job(text, home) is None
    assert not (tmp_path / ".local").exists()


def test_without_a_home_nothing_is_kept(tmp_path: Path) -> None:
    for environ in ({}, {"HOME": ""}, {"XDG_STATE_HOME": "relative"}):
        remember_job("12", SlurmJob(tmp_path), environ)
        assert find_job("12", environ) is None


def test_old_jobs_are_forgotten(home: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(slurm_jobs, "MAX_KEPT", 3)
    for number in range(5):
        remember_job(str(number), SlurmJob(tmp_path), home)
        os.utime(tmp_path / ".local/state/elastic-ckpt/slurm" / str(number), (number, number))
    remember_job("9", SlurmJob(tmp_path), home)
    kept = {path.name for path in (tmp_path / ".local/state/elastic-ckpt/slurm").iterdir()}
    assert kept == {"3", "4", "9"}
