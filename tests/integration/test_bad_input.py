"""Foreseeable errors end with their own exit code and one line on how to fix them."""

import os
import subprocess
import sys

import pytest

from elastic_ckpt.checkpoint.manifest import sign
from tests.job import TINY, Job, environment

pytestmark = pytest.mark.one_torch


def errors_of(job: Job) -> list[str]:
    return [line for line in job.log.read_text().splitlines() if "error:" in line]


def script(tmp_path, text: str):
    path = tmp_path / "script.py"
    path.write_text(text)
    return path


def test_failing_import_is_not_retried(tmp_path):
    with Job(tmp_path, script=script(tmp_path, "import no_such_module\n")) as job:
        assert job.start().wait() == 70
        assert job.view().incarnation == 1
        assert "no_such_module" in job.view().message


@pytest.mark.slow
def test_script_without_a_session_restarts_with_a_warning(tmp_path):
    text = f"""
import os, pathlib, sys
mark = pathlib.Path({str(tmp_path)!r}) / "second"
if not mark.exists() and os.environ["RANK"] == "0":
    mark.touch()
    os.kill(os.getpid(), 9)
"""
    with Job(tmp_path, script=script(tmp_path, text)) as job:
        assert job.start().wait() == 0, job.output()
        view = job.view()
        assert view.incarnation == 2  # after a restart
        assert "no checkpoints" in view.warnings[0]
        assert view.exit_code == 0


@pytest.mark.slow
def test_script_without_a_session_ends_on_a_notice(tmp_path):
    with Job(tmp_path, script=script(tmp_path, "import time\ntime.sleep(600)\n")) as job:
        job.start().until(lambda view: len(view.workers) == 2, "two workers")
        job.process.terminate()
        assert job.wait(50) == 76, job.output()


@pytest.mark.slow
def test_changed_data_set_stops_the_job_and_keeps_checkpoints(tmp_path):
    with Job(tmp_path, "--interval", "5", "--epochs", "1") as job:
        assert job.start().wait() == 0
        kept = [path.name for path in job.checkpoints()]
        job.arguments += ["--size", "150", "--epochs", "2"]
        assert job.start().wait() == 65, job.output()
        assert any("150 samples instead of 203" in line for line in errors_of(job))
        assert [path.name for path in job.checkpoints()] == kept
        job.arguments += ["--size", "203", "--seed", "6"]
        assert job.start().wait() == 65
        assert any("seed 6 instead of 5" in line for line in errors_of(job))


@pytest.mark.slow
def test_checkpoint_of_a_newer_format_stops_the_job(tmp_path):
    with Job(tmp_path, "--interval", "5", "--epochs", "1") as job:
        assert job.start().wait() == 0
        newest = max(job.checkpoints(), key=lambda path: int(path.name.split("-")[-1]))
        manifest = (newest / "manifest.json").read_bytes()
        (newest / "manifest.json").write_bytes(
            sign(manifest.replace(b'"format": 2', b'"format": 9'))
        )
        assert job.start().wait() == 65, job.output()
        assert any("upgrade elastic-ckpt" in line for line in errors_of(job))
        assert newest.exists()


def test_without_a_sealed_checkpoint_it_exits_65_and_keeps_foreign_files(tmp_path):
    with Job(tmp_path) as job:
        foreign = job.directory / "epoch-0_step-7" / "modeling"
        foreign.mkdir(parents=True)
        assert job.start().wait() == 65, job.output()
        assert foreign.exists()
        assert any("is usable (epoch-0_step-7 not sealed)" in line for line in errors_of(job))
        assert "not sealed" in job.view().rejected[0].reason


def test_corrupt_newest_checkpoint_is_quarantined(tmp_path):
    with Job(tmp_path, "--interval", "5", "--epochs", "1") as job:
        assert job.start().wait() == 0
        newest = max(job.checkpoints(), key=lambda path: int(path.name.split("-")[-1]))
        part = newest / "modeling" / "00000.safetensors"
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
        assert job.start().wait() == 0, job.output()
        (bad,) = [entry for entry in job.view().rejected if newest.name in entry.path]
        assert "does not match its checksum" in bad.reason
        assert newest.exists()  # saved again after resuming from the previous one


@pytest.mark.slow
def test_second_supervisor_exits_73_and_names_the_holder(tmp_path):
    with Job(tmp_path, "--epochs", "1000", "--pause", "0.05") as job:
        job.start().until_training()
        for options in ((), ("--node-name", "elsewhere")):
            second = subprocess.run(
                [sys.executable, "-m", "elastic_ckpt", "run", "--dir", str(job.directory),
                 *options, "--", str(TINY)],
                capture_output=True, text=True, timeout=60, env=environment(), check=False,
            )  # fmt: skip
            assert second.returncode == 73
            assert second.stderr.endswith(f"\n  elastic-ckpt status {job.directory}\n")
            assert f"pid {job.process.pid} on {os.uname().nodename}" in second.stderr


@pytest.mark.slow
def test_session_in_another_directory_is_an_error(tmp_path):
    text = """
import torch
from elastic_ckpt import Session
with Session("somewhere-else", model=torch.nn.Linear(1, 1)):
    pass
"""
    with Job(tmp_path, script=script(tmp_path, text), nproc=1) as job:
        assert job.start().wait() == 64, job.output()
        assert any("omit save_dir in the script" in line for line in errors_of(job))


def test_loader_without_an_elastic_sampler_is_an_error(tmp_path):
    text = """
import torch
from elastic_ckpt import Session
from torch.utils.data import DataLoader
with Session(model=torch.nn.Linear(1, 1)) as session:
    for epoch in session.epochs(1):
        for batch in session.batches(DataLoader(torch.ones(4), shuffle=True)):
            pass
"""
    with Job(tmp_path, script=script(tmp_path, text), nproc=1) as job:
        assert job.start().wait() == 64, job.output()
        assert any("ElasticSampler" in line for line in errors_of(job))


@pytest.mark.slow
def test_loaders_of_unequal_length_are_an_error(tmp_path):
    text = """
import os, torch, torch.distributed as dist
from elastic_ckpt import ElasticSampler, Session
from torch.utils.data import DataLoader
dist.init_process_group("gloo")
data, size = torch.ones(16, 1), 1 + dist.get_rank()
with Session(model=torch.nn.Linear(1, 1)) as session:
    for epoch in session.epochs(1):
        for batch in session.batches(DataLoader(data, size, sampler=ElasticSampler(data))):
            pass
"""
    with Job(tmp_path, script=script(tmp_path, text)) as job:
        assert job.start().wait() == 70, job.output()
        assert any("different numbers of batches (4 8)" in line for line in errors_of(job))


@pytest.mark.slow
def test_missing_process_group_is_an_error(tmp_path):
    text = """
import torch
from elastic_ckpt import Session
with Session(model=torch.nn.Linear(1, 1)):
    pass
"""
    with Job(tmp_path, script=script(tmp_path, text)) as job:
        assert job.start().wait() == 64, job.output()
        assert any("init_process_group" in line for line in errors_of(job))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a small tmpfs")
def test_full_disk_fails_saves_but_not_training(tmp_path):
    """Training reaches its end, where the last save fails; sealed checkpoints stay."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], check=True)
    try:
        with Job(small, "--interval", "1", "--epochs", "4") as job:
            job.log = tmp_path / "log"
            job.options = ["--max-failures", "1", "--memory-dir", "off"]
            assert job.start().wait() == 70, job.output()
            assert "failed, training continues" in job.output()
            assert "free: delete something there" in job.output()
            view = job.view()
            assert job.output().count("failed, training continues") > 2
            assert view.newest_intact is not None
            assert "free" in view.last_save.error
            assert view.newest_intact is not None
            assert not list((job.directory / ".attempts").iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)
