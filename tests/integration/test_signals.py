"""Signals that SLURM sends to every process of a step must not kill workers."""

import contextlib
import signal
import time

import psutil
import pytest

from tests.job import Job


@pytest.mark.slow
def test_sigterm_to_workers_and_loader_children_is_ignored(tmp_path):
    arguments = ("--epochs", "3", "--pause", "0.005", "--digest", str(tmp_path / "digest"))
    with Job(tmp_path, *arguments) as job:
        job.start().until_training()
        children: set[int] = set()
        sent = 0
        limit = time.monotonic() + 150
        while job.process.poll() is None and time.monotonic() < limit:
            with contextlib.suppress(psutil.Error, IndexError):
                for worker in job.workers():
                    for child in worker.children():
                        children.add(child.pid)
                        child.send_signal(signal.SIGTERM)
                    worker.send_signal(signal.SIGTERM)
                    sent += 1
        assert job.wait(60) == 0, job.output()
        assert (tmp_path / "digest").exists()
        # Two ranks with two DataLoader children in each remaining epoch.
        assert sent > 20 and len(children) >= 8
        assert job.view().incarnation == 1
