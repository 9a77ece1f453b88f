"""The command of kubernetes/job.yaml with the rights and the file systems that its pod has.

A read-only root, ``/dev/shm`` as mounted, no capability, no new privilege, PID 1. What is not like
a pod: the user is the one that runs the tests, and there is no seccomp filter.
"""

from __future__ import annotations

import os
import shutil
import signal
import urllib.request
from pathlib import Path

import pytest

from tests.job import Job, survivors
from tests.kubernetes import Workload, workloads
from tests.ports import free_port

pytestmark = [
    pytest.mark.one_torch,
    pytest.mark.skipif(
        os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")),
        reason="a pod's namespaces need root and util-linux",
    ),
]

ENTER = """
mount --bind "$1" "$1"  # volumes of the pod
mount --bind /tmp /tmp
mount -t tmpfs -o size=256m,mode=1777 tmpfs /dev/shm
mount -o remount,bind,ro /
shift
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""


def pod(root: Path, work: Workload, port: int) -> tuple[Job, list[str]]:
    """Return a job that starts as the pod's first process, and the options of ``run``."""
    job = Job(root, "--epochs", "1000", "--pause", "0.01")
    root.chmod(0o2770)  # as fsGroup has the root of a volume
    job.prefix = [
        "unshare", "--fork", "--pid", "--mount-proc", "--propagation", "private", "--kill-child",
        "sh", "-ec", ENTER, "sh", str(root),
        "env", "HOME=/tmp", "KUBERNETES_SERVICE_HOST=10.96.0.1",
    ]  # fmt: skip
    options = work.arguments(NODE_NAME="machine-1")[1:-2]
    assert options[0] == "--dir=/data/gpt"
    metrics = f"--metrics=0.0.0.0:{port}"
    return job, [metrics if one.startswith("--metrics") else one for one in options[1:]]


def test_job_trains_is_ready_saves_on_sigterm_and_resumes(tmp_path: Path) -> None:
    (work,) = [one for one in workloads() if one.file == "job.yaml"]
    port = free_port()
    job, options = pod(tmp_path, work, port)
    with job:
        job.start(*options, "--save-interval", "5")
        view = job.until(lambda view: view.newest_intact is not None, "a save")
        probe = f"http://127.0.0.1:{port}{work.container['readinessProbe']['httpGet']['path']}"
        with urllib.request.urlopen(probe, timeout=5) as answer:
            assert answer.status == 200 and b"elastic_ckpt_step" in answer.read()
        (init,) = job.supervisor().children()
        tree = init.children(recursive=True)
        status = Path(f"/proc/{init.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status and "CapBnd:\t0000000000000000" in status
        mounts = Path(f"/proc/{init.pid}/mounts").read_text().splitlines()
        assert any(line.split()[1] == "/" and line.split()[3].startswith("ro") for line in mounts)
        init.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
        assert not survivors(tree)
        job.start(*options, "--save-interval", "5")
        job.until(
            lambda found: found.newest_intact.step > view.newest_intact.step + 10, "it resumes"
        )
        (again,) = job.supervisor().children()
        again.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
        assert job.view().supervisor.node == "machine-1"
