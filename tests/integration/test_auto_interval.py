"""A job that chooses its own save interval and reports it."""

import signal

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.save_requests import ask_for_save
from elastic_ckpt.policy.interval import FIRST_SAVE_SECONDS, daly_interval
from tests.job import Job

pytestmark = [pytest.mark.one_torch, pytest.mark.slow]


def test_interval_follows_the_cost_of_a_save_and_is_kept_for_the_next_run(tmp_path):
    options = ("--save-interval", "auto", "--mtbf", "1h")
    with Job(tmp_path, "--epochs", "500", "--size", "2000", "--pause", "0.02") as job:
        view = job.start(*options).until_training()
        assert view.save_interval.seconds == FIRST_SAVE_SECONDS
        assert view.last_emergency_save is None
        ask_for_save(JobDirectory.at(job.directory))
        view = job.until(
            lambda view: view.save_interval.seconds != FIRST_SAVE_SECONDS, "an interval", 30
        )
        [cost] = [e["data"]["stall_seconds"] for e in job.events() if e["event"] == "saved"]
        # Half a minute of training without a failure moves the hour by less than one per cent.
        wanted = daly_interval(cost, 3600.0)
        assert wanted <= view.save_interval.seconds < 1.01 * wanted
        assert view.save_interval.why.startswith("every ")
        assert view.save_interval.why.endswith(" and the job fails every 60 min")

        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
        view = job.view()
        assert view.last_emergency_save.predicted_seconds > 0
        assert 0 < view.last_emergency_save.actual_seconds < 30
        assert view.last_save.predicted_seconds == view.last_emergency_save.predicted_seconds

        # The next run needs no first save to learn from.
        view = job.start(*options).until_training()
        assert view.save_interval.seconds != FIRST_SAVE_SECONDS
        assert "a save costs" in view.save_interval.why
