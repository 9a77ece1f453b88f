"""Supervisor and workers in environments of their own."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.interpreters import REPOSITORY, make_environment
from tests.job import TINY, Job, environment, kill_tree, survivors
from tests.waiting import until

pytestmark = pytest.mark.one_torch


def test_supervisor_without_torch_runs_the_jobs_python(tmp_path: Path) -> None:
    """A notice, and a second run; nothing of the supervisor's environment reaches a worker."""
    ours = make_environment(tmp_path / "supervisor", torch=False)
    theirs = make_environment(tmp_path / "workers")
    job, package = tmp_path / "job", tmp_path / "package"
    package.mkdir()
    (package / "trains.py").write_text(
        "import os, runpy, shutil, sys\n"
        f"sys.argv[0] = {str(TINY)!r}\n"
        "print('mine', sys.executable, shutil.which('python'), os.environ['VIRTUAL_ENV'])\n"
        f"runpy.run_path({str(TINY)!r}, run_name='__main__')\n"
    )
    [site] = (tmp_path / "workers/lib").glob("python*/site-packages")
    (site / "of_the_job.pth").write_text(f"{package}\n")
    variables = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    base = [str(ours), "-m", "elastic_ckpt"]
    run = [*base, "run", "--dir", str(job), "--nproc", "2", "--notice-source", "none"]
    script = ["-m", "trains", "--epochs", "1000", "--pause", "0.01"]

    refused = subprocess.run(
        [*run, "--", str(TINY)], env=variables, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 64 and "name the job's own Python by --python" in refused.stderr
    assert not job.exists()

    steps = []
    for _ in range(2):
        with open(tmp_path / "log", "ab") as log:
            process = subprocess.Popen(
                [*run, "--python", str(theirs), *script], env=variables, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, cwd=tmp_path,
            )  # fmt: skip
        try:
            workers = _until_training(base, job, process, variables)
            tree = [process.pid, *(one.pid for one in psutil.Process(process.pid).children(True))]
            exes = {}
            for one in tree:
                with contextlib.suppress(psutil.Error):  # it has ended, as one that looked does
                    exes[one] = psutil.Process(one).cmdline()[0]
            assert exes.pop(process.pid) == str(ours)
            assert set(exes.values()) <= {str(theirs)} and len(exes) >= 4  # agent, template, ranks
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "libtorch" not in maps
            assert all("libtorch" in Path(f"/proc/{one}/maps").read_text() for one in workers)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75, (tmp_path / "log").read_text()
        finally:
            if process.poll() is None:
                kill_tree(psutil.Process(process.pid))
                process.wait(20)
                Job(tmp_path).close()  # what it left in memory
        listed = subprocess.run([*base, "list", str(job), "--json"], env=variables, text=True,
                                capture_output=True, timeout=60, check=True)  # fmt: skip
        steps.append(json.loads(listed.stdout)[-1]["step"])
        assert survivors([psutil.Process(one) for one in tree if psutil.pid_exists(one)]) == []
    shown = (tmp_path / "log").read_text()
    assert f"mine {theirs} {theirs} {tmp_path / 'workers'}" in shown
    assert "incarnation 2, from step" in shown and steps[1] >= steps[0]


def _until_training(base: list[str], job: Path, process, variables: dict[str, str]) -> list[int]:
    workers: list[int] = []

    def training() -> bool:
        assert process.poll() is None, (job.parent / "log").read_text()
        shown = subprocess.run(
            [*base, "status", str(job), "--json"], env=variables, capture_output=True, timeout=60
        )
        view = json.loads(shown.stdout) if shown.stdout else {}
        if view.get("state") != "running" or (view["position"] or {"step": 0})["step"] <= 20:
            return False
        workers[:] = [one["pid"] for one in view["workers"]]
        return True

    until(training, "training", 120)
    return workers


def test_environment_of_another_version_is_refused(tmp_path: Path) -> None:
    """Before anything is started or written."""
    old = tmp_path / "old" / "elastic_ckpt"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text('__version__ = "0.0.9"\n')
    theirs = make_environment(tmp_path / "workers", package=old.parent)
    base = [str(make_environment(tmp_path / "supervisor")), "-m", "elastic_ckpt", "run"]
    found = subprocess.run(
        [*base, "--dir", str(tmp_path / "job"), "--python", str(theirs), str(TINY)],
        env={k: v for k, v in environment().items() if k != "PYTHONPATH"},
        capture_output=True, text=True, timeout=60, cwd=REPOSITORY,
    )  # fmt: skip
    assert found.returncode == 64
    assert f"{theirs} has elastic-ckpt 0.0.9, which does not work with" in found.stderr
    assert not (tmp_path / "job").exists()
