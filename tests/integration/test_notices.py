"""A job on a node whose platform announces its end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.clouds import Aws, Azure, Cloud
from tests.job import Job

pytestmark = pytest.mark.one_torch

LONG = ("--epochs", "1000", "--pause", "0.01")


@pytest.fixture
def cloud_environment(monkeypatch: pytest.MonkeyPatch):
    def point_at(cloud: Cloud) -> None:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", cloud.url)
        monkeypatch.setenv("AZURE_METADATA_SERVICE_ENDPOINT", cloud.url)

    return point_at


def event_data(job: Job, event: str) -> list[dict]:
    return [one["data"] for one in job.events() if one["event"] == event]


def test_spot_notice_saves_within_its_deadline(tmp_path: Path, cloud_environment) -> None:
    with Aws() as aws, Job(tmp_path, *LONG) as job:
        cloud_environment(aws)
        job.start("--notice-source", "aws", "--grace", "7").until_training()
        aws.interrupt("terminate", 120)
        assert job.wait() == 75, job.output()
        [notice] = event_data(job, "notice")
        assert (notice["source"], notice["reason"]) == ("aws", "spot instance: terminate")
        assert 100 < notice["seconds"] <= 121
        assert job.view().newest_intact.reason == "emergency"


@pytest.mark.slow
def test_rebalance_recommendation_saves_without_a_stop(tmp_path: Path, cloud_environment):
    with Aws() as aws, Job(tmp_path, *LONG) as job:
        cloud_environment(aws)
        job.start("--notice-source", "aws", "--save-interval", "100000").until_training()
        aws.recommend()
        job.until(lambda view: view.newest_intact is not None, "an early save")
        before = job.view()
        assert before.state == "running"
        assert event_data(job, "warning") == [
            {"source": "aws", "reason": "rebalance recommendation"}
        ]
        job.until_step(before.newest_intact.step + 5)


@pytest.mark.slow
def test_warning_stops_or_is_ignored_by_option(tmp_path: Path) -> None:
    for how, code in (("stop", 75), ("ignore", None)):
        notice = tmp_path / f"notice-{how}"
        with Job(tmp_path / how, *LONG) as job:
            job.options = ["--notice-file", str(notice), "--on-warning", how]
            job.start("--save-interval", "100000").until_training()
            notice.write_text("warning of a storm\n")
            job.until(lambda view, job=job: event_data(job, "warning"), "the warning")
            if code is None:
                job.until_step(job.view().position.step + 20)
                assert job.checkpoints() == []
            else:
                assert job.wait() == code, job.output()


@pytest.mark.slow
def test_start_under_a_pending_notice_waits_and_obeys_a_signal(
    tmp_path: Path, cloud_environment
) -> None:
    """As systemd restarts a job on a spot node that it has just left."""
    with Aws() as aws, Job(tmp_path, *LONG) as job:
        cloud_environment(aws)
        job.options = ["--notice-source", "aws"]
        job.start().until_training()
        aws.interrupt("terminate", 120)
        assert job.wait() == 75, job.output()
        job.start()
        job.until(lambda view: "waiting" in view.message, "the wait")
        polled = len(aws.requests)
        view = job.until(lambda view: len(aws.requests) > polled + 4, "further polls of the notice")
        assert (view.state, view.workers) == ("starting", [])
        assert "goes away in 1" in view.message and "the job starts at" in view.message, (
            view.message
        )
        assert len(event_data(job, "held")) == 1
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()


@pytest.mark.slow
def test_node_that_outlives_its_deadline_trains_again(tmp_path: Path) -> None:
    """The preemption was cancelled, which no platform announces."""
    sooner = tmp_path / "sooner"
    sooner.mkdir()
    (sooner / "sitecustomize.py").write_text(
        "import elastic_ckpt.supervisor.preemption as s\ns.CALLED_OFF_SECONDS = 1.0\n"
    )
    notice = tmp_path / "notice"
    notice.write_text("5 for nothing\n")
    with Job(tmp_path, *LONG) as job:
        job.packages = [sooner]
        job.start("--notice-file", str(notice))
        job.until(lambda view: "waiting" in view.message, "the wait")
        job.until_training()


@pytest.mark.slow
def test_save_is_tried_after_a_passed_deadline(tmp_path: Path) -> None:
    """AWS hibernates a machine at once and announces it afterwards."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with Job(tmp_path, *LONG) as job:
        job.start("--notice-file", str(fifo)).until_training()
        fifo.write_text("0 gone already\n")
        assert job.wait() == 75, job.output()


@pytest.mark.slow
def test_failing_metadata_service_does_not_disturb_the_job(
    tmp_path: Path, cloud_environment
) -> None:
    with Aws() as aws, Job(tmp_path, "--epochs", "2") as job:
        aws.fault = "500"
        cloud_environment(aws)
        assert job.start("--notice-source", "aws").wait() == 0, job.output()
        assert aws.requests and job.view().restarts.failures == 0


def test_azure_event_is_acknowledged_after_the_seal(tmp_path: Path, cloud_environment) -> None:
    with Azure() as azure, Job(tmp_path, *LONG) as job:
        cloud_environment(azure)
        job.start("--notice-source", "azure", "--acknowledge").until_training()
        azure.schedule("Preempt", 60)
        assert job.wait() == 75, job.output()
        assert azure.events[0]["EventStatus"] == "Started"
        assert job.view().newest_intact.reason == "emergency"


@pytest.mark.slow
def test_second_notice_with_less_time_shortens_the_deadline(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with Job(tmp_path, *LONG) as job:
        job.start("--notice-file", str(fifo)).until_training()
        fifo.write_text("300 the first\n30 the second\n")
        assert job.wait() == 75, job.output()
        reasons = [notice["reason"] for notice in event_data(job, "notice")]
        assert reasons == ["the first", "the second"]
