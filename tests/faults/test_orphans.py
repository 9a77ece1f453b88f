"""SIGKILL to supervisor, agent or template: no process stays, and the job resumes."""

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest

from tests.job import Job, survivors
from tests.marks import slow

pytestmark = pytest.mark.one_torch


def shared_memory(job: Job) -> set[str]:
    """Return files in shared memory that the job has mapped, mostly semaphores."""
    found: set[str] = set()
    for process in job.tree():
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            found |= set(re.findall(r"/dev/shm/\S+", maps))
    return found


@pytest.mark.parametrize("victim", ["supervisor", slow("agent"), slow("forkserver")])
def test_killed_process_takes_its_children_along(tmp_path, victim):
    calm = tmp_path / "calm"
    arguments = ("--epochs", "3", "--interval", "5", "--pause", "0.2", "--calm", str(calm))
    with Job(tmp_path, *arguments) as job:
        job.start().until_step(6)
        mapped = shared_memory(job)
        assert mapped
        supervisor = job.supervisor()
        doomed = [process for process in job.tree() if process != supervisor]
        # 2 workers with 2 DataLoader children each, the template, torch's helpers, the agent
        assert len(doomed) >= 8
        calm.touch()
        if victim != "supervisor":
            # The resource tracker serves the agent and may live as long.
            doomed = [p for p in doomed if victim == "agent" or p in job.workers()]
            getattr(job, victim)().send_signal(signal.SIGKILL)
            assert not survivors(doomed)
            assert job.wait(120) == 0, job.output()
            assert job.view().restarts.failures == 1
        else:
            supervisor.send_signal(signal.SIGKILL)
            assert not survivors([supervisor, *doomed])
            view = job.view()
            assert (view.state, view.exit_code) == ("dead", 2)
            assert job.start().wait(120) == 0, job.output()
        assert job.view().state == "finished"
    assert not [name for name in mapped if os.path.exists(name)]


@pytest.mark.slow
def test_workers_end_when_both_parents_are_killed(tmp_path):
    with Job(tmp_path, "--epochs", "1000", "--workers", "0", "--pause", "0.01") as job:
        job.start().until_step(3)
        workers, agent, supervisor = job.workers(), job.agent(), job.supervisor()
        supervisor.send_signal(signal.SIGSTOP)  # so that it cannot clean up first
        agent.send_signal(signal.SIGKILL)
        supervisor.send_signal(signal.SIGKILL)
        assert not survivors(workers)


@pytest.mark.slow
def test_second_interrupt_stops_at_once(tmp_path):
    with Job(tmp_path, "--epochs", "50", "--pause", "2") as job:
        job.start().until_step(1)
        tree = job.tree()
        job.process.send_signal(signal.SIGINT)
        job.until(lambda view: view.state == "draining", "draining")
        job.process.send_signal(signal.SIGINT)
        assert job.wait(50) == 76, job.output()
        assert not survivors(tree)
