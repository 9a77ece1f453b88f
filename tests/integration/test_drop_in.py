"""A loop of the seed's shape gains the emergency save by one line."""

import importlib.util
import json

import pytest

from tests.job import SCRIPTS, Job
from tests.marks import slow

ENGINES = [
    slow("torch"),
    pytest.param(
        "colossalai",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("colossalai") is None, reason="ColossalAI is not installed"
        ),
    ),
]


def results(path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("engine", ENGINES)
def test_preempted_and_killed_job_ends_with_the_same_parameters(tmp_path, engine):
    arguments = ("--engine", engine, "--results", str(tmp_path / "results"))
    script = SCRIPTS / "seed_shape.py"
    with Job(tmp_path / "calm", *arguments, "--pause", "0", script=script) as calm:
        assert calm.start().wait(120) == 0, calm.output()
    with Job(tmp_path / "wild", *arguments, script=script) as job:
        job.start().until_step(5)
        job.process.terminate()
        assert job.wait(60) == 75, job.output()
        saved = job.view().newest_intact
        assert saved.reason == "emergency"
        assert saved.step >= 5
        job.start().until_training()
        # Steps count from this incarnation's start; wait for some after the interval's save.
        job.until(lambda view: view.newest_intact.reason == "interval", "an interval's save")
        job.workers()[0].kill()
        assert job.wait(90) == 0, job.output()
        for path in job.checkpoints():
            assert {"lr_scheduler", "modeling", "optimizer", "running_states.json"} <= {
                entry.name for entry in path.iterdir()
            }
    (start, digest), (restart, same) = results(tmp_path / "results")
    assert (start, restart > 0) == (0, True)
    assert digest == same


@pytest.mark.one_torch
@pytest.mark.slow
def test_stop_after_a_requested_save_finds_all_ranks_at_one_step(tmp_path):
    """The loop cannot stop between the save and the next step, so that step counts."""
    arguments = ("--engine", "torch", "--steps", "200", "--every", "0", "--pause", "0.05")
    with Job(tmp_path, *arguments, script=SCRIPTS / "seed_shape.py") as job:
        job.start().until_step(3)
        for _ in range(3):
            (job.directory / ".elastic-ckpt" / "requests" / "save-now").touch()
            job.until(
                lambda view: view.newest_intact is not None and view.newest_intact.step > 3,
                "the requested save",
            )
        (job.directory / ".elastic-ckpt" / "requests" / "save-now").touch()
        job.process.terminate()
        assert job.wait(50) == 75, job.output()


@pytest.mark.one_torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--save-interval", "10"], [10, 20, 30, 40]),
        (["--save-interval", "100000s"], []),
        ([], [25]),
    ],
    ids=["steps", "seconds", "none"],
)
def test_command_line_interval_overrides_the_loop(tmp_path, options, steps):
    arguments = ("--engine", "torch", "--steps", "40", "--every", "25", "--pause", "0")
    with Job(tmp_path, *arguments, script=SCRIPTS / "seed_shape.py") as job:
        assert job.start(*options).wait() == 0, job.output()
        found = sorted(int(path.name.partition("step-")[2]) for path in job.checkpoints())
        assert found == steps


@pytest.mark.one_torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "found"), [(["--save-interval", "100000s"], {"final"}), ([], {"interval", "final"})]
)
def test_interval_in_seconds_overrides_the_session(tmp_path, options, found):
    with Job(tmp_path, "--epochs", "1", "--interval", "5") as job:
        assert job.start(*options).wait() == 0, job.output()
        reasons = {event["data"]["reason"] for event in job.events() if event["event"] == "saved"}
        assert reasons == found
