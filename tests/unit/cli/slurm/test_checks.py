"""What is refused before it is queued, with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_ckpt.cli.slurm.checks import check_options, first_task, node_range
from elastic_ckpt.cli.slurm.sbatch_options import read_options
from elastic_ckpt.errors import UsageError


def check(line: str, **params: Any) -> None:
    check_options(read_options(line.split()), {"nnodes": None, **params})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ntasks-per-node=8", "set nproc in the job file"),
        ("--ntasks-per-node 1 --ntasks-per-node 2", "several supervisors"),
        ("--ntasks-per-gpu=1", "several supervisors"),
        ("--ntasks-per-socket=1", "several supervisors"),
        ("-n8", "leave it out"),
        ("-n4 -N2", "leave it out"),
        ("--ntasks=2 --nodes=2-4", "leave it out"),
        ("--wrap=x", "into setup"),
        ("--wait", "status --watch"),
        ("--version", "sbatch --version"),
        ("--container-image=x", r'srun = \["--container-image=x"\]'),
        ("--signal=B:KILL@60", "use B:USR1"),
        ("--signal=HUP@60", "use USR1"),
        ("--signal=B:3", "QUIT is not a notice"),
    ],
)
def test_refused(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(line)


@pytest.mark.parametrize(
    "line",
    [
        "--ntasks-per-node=1",
        "-n2 -N2",
        "-n1",
        "--gpus-per-task=8 --cpus-per-task=64",
        "--signal=B:USR1@120",
        "--signal=SIGUSR2",
        "--signal=RB:TERM@60",
        "--signal=B:10@60",
        "--nodes=2-4",
        "--array=1-8%2",
    ],
)
def test_allowed(line: str) -> None:
    check(line)


def test_nodes_must_fit_the_job_file() -> None:
    check("-N2", nnodes="2:4")
    check("-N2-3", nnodes="2:4")
    check("-n3 -N3", nnodes="2:4")
    check("-n2", nnodes="2")
    for line in ("-N1", "-N3-5", "-N8"):
        with pytest.raises(UsageError, match="change nnodes"):
            check(line, nnodes="2:4")


@pytest.mark.parametrize("key", ["watch", "finished_when", "metrics_file", "rdzv_endpoint"])
def test_an_array_refuses_what_its_tasks_would_share(key: str) -> None:
    check("-N1", **{key: "x"})
    with pytest.raises(UsageError, match="the same for all tasks of the array"):
        check("-a1-2", **{key: "x"})


def test_the_first_task_is_named() -> None:
    for line, task in (("-a 3,5", "_3"), ("--array=0-7:2", "_0"), ("-N1", "")):
        assert first_task(read_options(line.split())) == task


def test_only_slurm_knows_some_numbers_of_nodes() -> None:
    assert node_range(read_options(["-N1k"]), {}) == (0, 0)
    assert node_range(read_options(["-N2-4"]), {}) == (2, 4)
    assert node_range([], {"nnodes": "2:4"}) == (2, 4)
