"""Real SLURM jobs: preempted, cancelled, out of time, on two nodes, in arrays, on a lost node."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.cli.status.view import StatusView
from tests.job import TINY, Job, used_samples
from tests.slurm import Slurm, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

ARGUMENTS = ["--epochs", "7", "--pause", "0.06", "--interval", "20"]
LONG = ["--epochs", "1000", "--pause", "0.02", "--interval", "50"]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Slurm]]:
    """Makes clusters, in directories whose names are short."""
    made: list[Slurm] = []

    def make(**keywords: object) -> Slurm:
        cluster = Slurm(tmp_path_factory.mktemp("s"), **keywords)
        made.append(cluster)
        cluster.__enter__()
        cluster.environment["XDG_STATE_HOME"] = str(cluster.root / "home")
        return cluster

    yield make
    for cluster in made:
        cluster.__exit__(None, None, None)
        Job(cluster.root).close()  # what a job that was killed left in memory
        for task in cluster.root.glob("job/task-*"):
            left = Job(task)
            left.directory = task
            left.close()


class Submitted:
    """A job file, submitted as a user does."""

    def __init__(self, cluster: Slurm, arguments: list[str], *options: str, **keys: object):
        self.cluster = cluster
        self.job = Job(cluster.root)  # its directory, files and events
        file = cluster.root / "job.toml"
        self.trace = cluster.root / "trace"
        self.digest = cluster.root / "digest"
        outcome = ["--trace", str(self.trace), "--digest", str(self.digest)]
        known = {"dir": "job", "script": str(TINY), "args": arguments + outcome, "nproc": 2}
        lines = [f"{key} = {json.dumps(value)}" for key, value in (known | keys).items()]
        file.write_text("\n".join(lines) + "\n")
        printed = cluster.run(
            "elastic-ckpt", "slurm", "submit", str(file), "--", "--partition=low", *options
        )
        self.number = printed.split()[2].rstrip(":")

    def view(self, number: str = "") -> StatusView:
        shown = self.cluster.call("elastic-ckpt", "status", "--json", number or self.number)
        assert shown.returncode in (0, 1, 2), shown.stderr
        return msgspec.json.decode(shown.stdout, type=StatusView)

    def until(self, condition, what: str, seconds: float = 180.0, number: str = "") -> StatusView:
        limit = time.monotonic() + seconds
        while True:
            if (self.cluster.root / "home").exists() and self.job.directory.exists():
                shown = self.cluster.call("elastic-ckpt", "status", "--json", number or self.number)
                if shown.returncode in (0, 1, 2):
                    view = msgspec.json.decode(shown.stdout, type=StatusView)
                    if condition(view):
                        return view
            if time.monotonic() > limit:
                message = self.cluster.output(self.number)
                self.cluster.fail(f"not within {seconds} s: {what}\n{message}")
            time.sleep(0.5)  # asking starts an interpreter, which the job would wait for

    def until_step(self, step: int) -> StatusView:
        return self.until(
            lambda view: (
                view.state == "running"
                and view.position is not None
                and view.position.step >= step
                and len(view.workers) > 0
            ),
            f"step {step}",
        )

    def high(self, *options: str) -> str:
        """A job that takes all nodes, for a moment."""
        return self.cluster.sbatch(
            "--partition=high", "--nodes=2", "--output=/dev/null", *options, "--wrap=sleep 1"
        )

    def stopped(self) -> int:
        """The step that the first incarnation stopped at, where a checkpoint stands."""
        ended = next(one["data"] for one in self.job.events() if one["event"] == "ended")
        assert ended["kind"] == "stopped", ended
        saved = [one["data"]["step"] for one in self.job.events() if one["event"] == "saved"]
        assert ended["finished"] in saved
        return ended["finished"]

    def moments(self, event: str, **data: object) -> list[float]:
        """Monotonic seconds of each such event."""
        return [
            one["monotonic"]
            for one in self.job.events()
            if one["event"] == event and data.items() <= one["data"].items()
        ]


def undisturbed(directory: Path, arguments: list[str]) -> tuple[str, dict]:
    """Digest of the parameters and the samples of a run that nothing happens to."""
    digest, trace = directory / "digest", directory / "trace"
    with Job(directory, *arguments, "--digest", str(digest), "--trace", str(trace)) as job:
        assert job.start().wait() == 0, job.output()
    return digest.read_text(), used_samples(trace, 2)


def test_preempted_job_is_requeued_and_resumes_exactly(
    slurm: Callable[..., Slurm], tmp_path: Path
) -> None:
    expected = undisturbed(tmp_path, ARGUMENTS)
    cluster = slurm(grace=10)
    job = Submitted(cluster, ARGUMENTS, "--time=60")
    job.until_step(20)
    high = job.high()
    cluster.until(job.number, lambda seen: seen.get("Restarts") == "1", "requeued")
    cluster.until_state(high, "COMPLETED")
    cluster.until_state(job.number, "COMPLETED")
    assert (job.digest.read_text(), used_samples(job.trace, 2)) == expected
    [notice, *_] = job.moments("notice")
    [saved] = job.moments("saved", step=job.stopped())
    [_, second] = job.moments("start")
    steps = job.moments("state", state="running")
    assert [event["data"]["slurm_restarts"] for event in job.job.events() if
            event["event"] == "start"] == [None, "1"]  # fmt: skip
    graces = [e["data"]["seconds"] for e in job.job.events() if e["event"] == "notice"]
    assert 0 < min(graces) <= 10
    output = cluster.output(job.number)
    assert "requeued" in output and "finished" in output  # one file, which was not cut
    assert f"SLURM requeues job {job.number} unless it was cancelled" in output
    print(
        f"\npreempted with a grace of 10 s: notice to sealed {saved - notice:.2f} s; "
        f"sealed to started again {second - saved:.1f} s; "
        f"started to training {steps[-1] - second:.2f} s"
    )


def test_cancelled_job_is_saved_and_not_requeued(slurm: Callable[..., Slurm]) -> None:
    """Even where SLURM itself queues a job again on 75."""
    for requeue_exit in ("", "75,76"):
        cluster = slurm(requeue_exit=requeue_exit, kill_wait=15)
        job = Submitted(cluster, LONG)
        job.until_step(30)
        cluster.scancel(job.number)
        seen = cluster.until_state(job.number, "CANCELLED")
        assert seen["Restarts"] == "0"
        view = job.view()
        assert (view.state, view.newest_intact.step) == ("preempted", job.stopped())
        assert view.advice.startswith("submit it again") and view.slurm.state == "CANCELLED"
        assert f"to submit it again:\n  {view.commands[0]}\n" in cluster.output(job.number)
        assert view.commands[0].endswith(f"slurm submit {cluster.root}/job.toml -- --partition=low")
        time.sleep(3)
        assert cluster.show(job.number)["JobState"] == "CANCELLED"


@pytest.mark.parametrize("partition", ["cut", "gone"])
def test_partition_without_grace_uses_kill_wait(
    slurm: Callable[..., Slurm], partition: str
) -> None:
    """Whether SLURM queues the jobs that it preempts there again or cancels them."""
    cluster = slurm(requeue_exit="75,76")
    job = Submitted(cluster, LONG, f"--partition={partition}")
    job.until_step(30)
    job.high()
    view = job.until(lambda view: view.incarnation == 2 and view.state == "running", "again", 90)
    assert view.restarts.preemptions == 1
    assert job.stopped() > 30
    cluster.scancel(job.number)
    cluster.until_state(job.number, "CANCELLED")


def test_time_limit_gives_notice_in_time_for_a_save(slurm: Callable[..., Slurm]) -> None:
    cluster = slurm(requeue_exit="75,76")
    job = Submitted(cluster, LONG, "--time=2")  # one minute is over before a busy machine trains
    job.until_step(30)
    cluster.until(job.number, lambda seen: seen["Restarts"] == "1", "requeued", 180)
    [notice] = [e["data"] for e in job.job.events() if e["event"] == "notice"]
    assert (notice["source"], notice["reason"]) == ("slurm", "time limit")
    assert job.stopped() > 30
    print(f"\ntime limit of 120 s: notice {notice['seconds']:.0f} s before it")
    cluster.scancel(job.number)
    cluster.until_state(job.number, "CANCELLED")


def test_two_nodes_rendezvous_and_resume_after_a_preemption(
    slurm: Callable[..., Slurm], tmp_path: Path
) -> None:
    expected = undisturbed(tmp_path, ARGUMENTS)
    cluster = slurm(grace=10, requeue_exit="75,76")
    job = Submitted(cluster, ARGUMENTS, nproc=1, nnodes=2)
    view = job.until_step(20)
    assert sorted(worker.node for worker in view.workers) == ["n1", "n2"]
    job.high()
    cluster.until(job.number, lambda seen: seen["Restarts"] == "1", "requeued", 60)
    cluster.until_state(job.number, "COMPLETED")
    assert (job.digest.read_text(), used_samples(job.trace, 2)) == expected
    output = cluster.output(job.number)
    assert "elastic-ckpt: n1: launching" in output and "elastic-ckpt: n2: " in output


def test_dead_node_loses_only_unsaved_steps(
    slurm: Callable[..., Slurm],
) -> None:
    cluster = slurm(node_timeout=4)
    job = Submitted(cluster, LONG)
    step = job.until(lambda view: view.newest_intact is not None, "a save").newest_intact.step
    job.until_step(step + 10)
    node = cluster.show(job.number)["NodeList"]
    cluster.kill_node(node)
    view = job.until(
        lambda view: view.incarnation == 2 and view.state == "running", "on the other", 90
    )
    assert view.position.step >= step
    assert cluster.show(job.number)["NodeList"] != node
    cluster.scancel(job.number)
    cluster.until_state(job.number, "CANCELLED")


def test_array_task_is_requeued_alone(slurm: Callable[..., Slurm]) -> None:
    cluster = slurm()
    job = Submitted(cluster, LONG, "--array=1-2")
    tasks = [f"{job.number}_{task}" for task in (1, 2)]
    for task in tasks:
        job.until(lambda view: view.state == "running", "training", number=task)
    # The last task bears the array's own number: to queue that again would take both.
    cluster.scancel(tasks[1], "--signal=TERM")
    cluster.until(tasks[1], lambda seen: seen["Restarts"] == "1", "requeued")
    first = cluster.show(tasks[0])
    assert (first["JobState"], first["Restarts"]) == ("RUNNING", "0")
    assert sorted(path.name for path in job.job.directory.iterdir()) == ["task-1", "task-2"]
    for task in tasks:
        cluster.scancel(task)
        cluster.until_state(task, "CANCELLED")


def test_a_job_is_known_before_it_starts(slurm: Callable[..., Slurm]) -> None:
    cluster = slurm()
    job = Submitted(cluster, LONG, "--array=1-2", "--hold")
    first, second = (f"{job.number}_{task}" for task in (1, 2))
    view = job.view(first)
    assert (view.state, view.exit_code, view.slurm.reason) == ("queued", 0, "JobHeldUser")
    assert view.commands == (f"scontrol release {first}",)
    found = cluster.call("elastic-ckpt", "list", second)
    assert (found.returncode, found.stdout) == (0, "")
    assert f"job {second} is queued in SLURM" in found.stderr
    found = cluster.call("elastic-ckpt", "status", job.number)
    assert f"name a task, {first}, {second}" in found.stderr
    again = ("elastic-ckpt", "slurm", "submit", "job.toml", "--", "--partition=low", "--array=2")
    found = cluster.call(*again)
    assert found.returncode == 64 and f"scancel {second} first" in found.stderr
    cluster.run("scontrol", "release", second)
    job.until(lambda view: view.state == "running", "training", number=second)
    cluster.run("scontrol", "requeue", second)
    view = job.until(lambda view: view.slurm is not None and view.slurm.waits, "", number=second)
    assert view.advice.startswith(f"SLURM has requeued job {second} (PENDING")
    for task in (first, second):
        cluster.scancel(task)
        cluster.until_state(task, "CANCELLED")
    view = job.view(first)
    assert (view.state, view.exit_code) == ("unknown", 2) and "CANCELLED" in view.message
    assert view.commands[0].endswith("--array=1-2 --hold --array=1")


def test_job_without_requeue_reports_it(slurm: Callable[..., Slurm]) -> None:
    cluster = slurm()
    job = Submitted(cluster, LONG, "--no-requeue")
    job.until_step(10)
    cluster.scancel(job.number, "--signal=TERM")
    cluster.until_state(job.number, "FAILED")
    assert "submit it with --requeue" in cluster.output(job.number)
    view = job.view()  # it has left the queue, and is found by its number all the same
    assert (view.state, view.newest_intact.step) == ("preempted", job.stopped())


def test_sbatch_error_is_one_line(slurm: Callable[..., Slurm]) -> None:
    cluster = slurm()
    (cluster.root / "job.toml").write_text(f'dir = "job"\nscript = "{TINY}"\n')
    found = cluster.call("elastic-ckpt", "slurm", "submit", "job.toml", "--", "--partition=no")
    assert found.returncode == 70
    assert "invalid partition" in found.stderr and found.stderr.count("\n") == 1
