"""What was learned of saves outlives the run, and no file can keep the next one from starting."""

from __future__ import annotations

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.prediction_file import read_predictor, write_predictor
from elastic_ckpt.policy.prediction import Predictor, Route
from tests.checkpoints import tree


def learned() -> Predictor:
    predictor = Predictor()
    predictor.observe(Route.DISK, 10**9, 2.0)
    predictor.observe(Route.DRAIN, 10**9, 3.0)
    return predictor


def test_the_next_run_keeps_what_this_one_learned(job: JobDirectory) -> None:
    write_predictor(job, learned())
    assert read_predictor(job) == learned()
    assert read_predictor(job).last_bytes == 10**9


def test_a_new_job_knows_nothing(job: JobDirectory) -> None:
    assert read_predictor(job) == Predictor()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"routes": 3}', '{"routes": {"tape": {}}}', '{"last_bytes": -5}',
     '{"last_bytes": 1e400}', '{"routes": {"disk": {"seconds_per_byte": 0, "least_seconds": 1}}}',
     '{"routes": {"disk": {"seconds_per_byte": 1e-9, "least_seconds": 1, "margin": 1e99}}}',
     "[" * 100_000, " " * 100_000],
)  # fmt: skip
def test_an_invalid_file_counts_as_missing(job: JobDirectory, text: str) -> None:
    job.prediction.write_text(text)
    assert read_predictor(job) == Predictor()
    write_predictor(job, learned())
    assert read_predictor(job) == learned()


def test_a_directory_that_was_replaced_by_a_link_is_neither_read_nor_written(
    job: JobDirectory, tmp_path
) -> None:
    write_predictor(job, learned())
    job.control.rename(tmp_path / "other")
    job.control.symlink_to(tmp_path / "other")
    before = tree(tmp_path / "other")
    assert read_predictor(job) == Predictor()
    write_predictor(job, Predictor())
    assert tree(tmp_path / "other") == before


def test_a_full_disk_is_not_an_error(job: JobDirectory) -> None:
    job.prediction.mkdir()
    write_predictor(job, learned())
    assert read_predictor(job) == Predictor()
