"""What SLURM's fields mean for a job; the real one is in ``tests/system``."""

from __future__ import annotations

import time

import pytest

from elastic_ckpt.cli.run.command import settings_of
from elastic_ckpt.errors import UsageError
from elastic_ckpt.notices import slurm
from elastic_ckpt.notices.slurm import SlurmSource, SlurmUnanswered, fields, job_id
from elastic_ckpt.policy.deadline import Notice, TimeLimit

CONFIG = "Configuration data\nKillWait                = 20 sec\nRequeueExit             = 75,76\n"
PARTITION = "PartitionName=low AllowGroups=ALL GraceTime=50 Hidden=NO"


class Controller:
    """Answers as scontrol prints; times in seconds from now."""

    def __init__(self) -> None:
        self.job: dict[str, object] = {"JobId": 7, "JobState": "RUNNING", "Partition": "low"}
        self.dead = False

    def __call__(self, *arguments: str) -> str:
        if self.dead:
            raise SlurmUnanswered("Unable to contact slurm controller (connect failure)")
        if "partition" in arguments:
            return PARTITION
        if "config" in arguments:
            return CONFIG
        wall = time.time()
        return " ".join(
            f"{name}={int(wall + value) if isinstance(value, float) else value}"
            for name, value in self.job.items()
        )


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    found = Controller()
    monkeypatch.setattr(slurm, "scontrol", found)
    return found


def poll(source: SlurmSource) -> list[tuple[type, str, float]]:
    now = time.monotonic()
    return [
        (type(event), event.reason, pytest.approx(event.deadline - now, abs=1.5))
        for _, event in source.poll()
    ]


def test_a_time_limit_is_reported_from_the_start(controller: Controller) -> None:
    controller.job |= {"TimeLimit": "01:00:00", "EndTime": 3600.0}
    source = SlurmSource({"SLURM_JOB_ID": "7"})
    assert poll(source) == [(TimeLimit, "time limit", 3600)]


def test_an_unlimited_job_has_no_limit(controller: Controller) -> None:
    controller.job |= {"TimeLimit": "UNLIMITED", "EndTime": "Unknown"}
    assert poll(SlurmSource({"SLURM_JOB_ID": "7"})) == []


@pytest.mark.parametrize("skew", [0.0, 1000.0, -1000.0])
@pytest.mark.parametrize("limited", [True, False])
def test_a_preempted_job_gets_its_grace_period(
    controller: Controller, limited: bool, skew: float
) -> None:
    """One without a limit has no end for as long as the grace lasts; whatever this node's clock."""
    end = skew + 50.0 if limited else "Unknown"
    controller.job |= {"PreemptTime": skew, "EndTime": end, "TimeLimit": "UNLIMITED"}
    source = SlurmSource({"SLURM_JOB_ID": "7"})
    source.poll_now()
    assert poll(source) == [(Notice, "preempted", 50)]


@pytest.mark.parametrize(
    ("reason", "what"), [("None", "cancelled or requeued"), ("TimeLimit", "time limit")]
)
def test_a_job_that_ends_gets_kill_wait(controller: Controller, reason: str, what: str) -> None:
    controller.job |= {"JobState": "COMPLETING", "Reason": reason, "EndTime": 0.0}
    source = SlurmSource({"SLURM_JOB_ID": "7"})
    source.poll_now()
    assert poll(source) == [(Notice, what, 20)]


def test_a_signal_to_a_job_that_continues_is_not_a_notice(controller: Controller) -> None:
    controller.job |= {"TimeLimit": "UNLIMITED", "EndTime": "Unknown"}
    source = SlurmSource({"SLURM_JOB_ID": "7"})
    source.poll_now()
    assert poll(source) == []


@pytest.mark.parametrize(
    ("left", "known"), [(70.0, True), (900.0, True), (1000.0, False), (-5.0, False)]
)
def test_a_signal_shortly_before_the_limit_announces_it(
    controller: Controller, left: float, known: bool
) -> None:
    """As of ``sbatch --signal``: the deadline is the limit, not what a cancelled job would have."""
    controller.job |= {"TimeLimit": "01:00:00", "EndTime": left}
    source = SlurmSource({"SLURM_JOB_ID": "7"})
    source.poll_now()
    kind, why = (Notice, "signal before the time limit") if known else (TimeLimit, "time limit")
    assert poll(source) == [(kind, why, left)]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu[007-009,12],m1", "gpu007"),
        ("a,b[1-2]", "a"),
        ("r[0-1]n[3,4]", "r0n3"),
        ("n[1-2]-ib", "n1-ib"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


def test_without_scontrol_nodes_meet_at_the_first_ones_name(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "2007")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    controller.dead = True
    assert slurm.head_endpoint() == "n1:29407"
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert slurm.head_endpoint() == ""


@pytest.mark.parametrize(("text", "most"), [("", 1), ("1(x4)", 1), ("1(x2),8", 8), ("2(x3),1", 2)])
def test_the_number_of_tasks_on_a_node(text: str, most: int) -> None:
    assert slurm.tasks_per_node({"SLURM_STEP_TASKS_PER_NODE": text}) == most


def test_several_supervisors_on_a_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_STEP_NODELIST": "n[1-2]",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"started 8 supervisors on a node: use srun --ntasks-per"):
        settings_of(["--dir", "x", "--grace", "30", __file__])


def test_without_a_controller_a_signal_gets_the_shortest_deadline(controller: Controller) -> None:
    controller.dead = True
    source = SlurmSource({"SLURM_JOB_ID": "7"})
    with pytest.raises(SlurmUnanswered):
        poll(source)
    source.poll_now()
    assert poll(source) == [(Notice, "SIGTERM, and the controller does not answer", 30)]


def test_the_grace_of_a_signal_is_the_longest_possible(controller, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_PARTITION", "low")
    assert slurm.signal_grace() == 50
    controller.dead = True
    assert slurm.signal_grace() is None


def test_an_array_task_has_its_own_job_id() -> None:
    array = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_id(array) == "7_2"
    assert job_id({"SLURM_JOB_ID": "7"}) == "7"
    assert job_id({}) == ""


def test_a_field_may_contain_spaces() -> None:
    line = "JobId=7 JobName=a b c Comment=x=y Reason=None ReqB:S:C:T=0:0:*:* TRES=cpu=2,node=1"
    found = fields(line)
    assert found["JobName"] == "a b c"
    assert (found["JobId"], found["Reason"]) == ("7", "None")


def test_requeue_exit_codes_may_be_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "scontrol", lambda *_: "RequeueExit = 3,70-76\n")
    assert slurm.requeue_exit_codes() == {3, *range(70, 77)}


def test_it_polls_more_often_as_the_limit_approaches(controller: Controller) -> None:
    source = SlurmSource({"SLURM_JOB_ID": "7"})
    for left, interval in ((7200.0, 300.0), (400.0, 100.0), (20.0, 15.0)):
        controller.job |= {"TimeLimit": "01:00:00", "EndTime": left}
        poll(source)
        assert source.interval_seconds == pytest.approx(interval, abs=1)
