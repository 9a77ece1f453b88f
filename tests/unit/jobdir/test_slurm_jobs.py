"""From a job's number to its directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elastic_ckpt.jobdir import slurm_jobs
from elastic_ckpt.jobdir.slurm_jobs import find_job, is_job_number, remember_job


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


def test_a_job_is_found_by_its_number(home: dict[str, str], tmp_path: Path) -> None:
    remember_job("12", tmp_path / "a b", home)
    remember_job("12_3", tmp_path / "task-3", home)
    assert find_job("12", home) == tmp_path / "a b"
    assert find_job("12_3", home) == tmp_path / "task-3"
    assert find_job("13", home) is None


@pytest.mark.parametrize("text", ["", "x", "../12", "12/..", "1_2_3", "-1", "१२"])
def test_invalid_job_numbers(home: dict[str, str], tmp_path: Path, text: str) -> None:
    assert not is_job_number(text)
    remember_job(text, tmp_path, home)
    assert find_job(text, home) is None
    assert not (tmp_path / ".local").exists()


def test_without_a_home_nothing_is_kept(tmp_path: Path) -> None:
    for environ in ({}, {"HOME": ""}, {"XDG_STATE_HOME": "relative"}):
        remember_job("12", tmp_path, environ)
        assert find_job("12", environ) is None


def test_old_jobs_are_forgotten(home: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(slurm_jobs, "MAX_KEPT", 3)
    for number in range(5):
        remember_job(str(number), tmp_path, home)
        os.utime(tmp_path / ".local/state/elastic-ckpt/slurm" / str(number), (number, number))
    remember_job("9", tmp_path, home)
    kept = {path.name for path in (tmp_path / ".local/state/elastic-ckpt/slurm").iterdir()}
    assert kept == {"3", "4", "9"}
