"""The platform findings: a cloud, systemd, SLURM, or none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from elastic_ckpt.cli.doctor.findings import Finding
from elastic_ckpt.cli.doctor.platform import Grace, check_platform, find_grace, nodes
from elastic_ckpt.errors import UsageError
from elastic_ckpt.notices import slurm
from tests.clouds import Aws, Azure, Cloud, Gcp

GRACE = Grace(30.0, "from --grace")
CONFIG = "KillWait = 20 sec\nRequeueExit = {}\n"


def look(
    *platforms: str, environ: dict[str, str] | None = None, booted: Path = Path("/nowhere")
) -> dict[str, Finding]:
    found = check_platform(platforms, GRACE, environ or {}, booted)
    return {one.what: one for one in found}


def test_a_machine_without_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = look()
    assert {one.state for one in found.values()} == {"ok"}
    assert found["notices"].text == "signals"
    assert found["SLURM"].text == "not installed"
    assert "75 and 76" in found["systemd"].text
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "slurm submit" in look()["SLURM"].text


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"NOTIFY_SOCKET": "/run/x", "INVOCATION_ID": "1"}, "started this process"),
        ({"INVOCATION_ID": "1"}, "in a unit"),
        ({}, "elastic-ckpt@NAME"),
    ],
)
def test_systemd(tmp_path: Path, environ: dict[str, str], says: str) -> None:
    assert says in look(environ=environ, booted=tmp_path)["systemd"].text


# Grace


def test_the_grace_and_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_grace(None, []) == Grace(30.0, "the default; set it with --grace")
    assert find_grace(7.0, ["slurm"]) == Grace(7.0, "from --grace")
    monkeypatch.setattr(slurm, "signal_grace", lambda: 120.0)
    assert find_grace(None, ["slurm"]) == Grace(120.0, "from SLURM")
    with pytest.raises(UsageError):
        find_grace(float("nan"), [])
    assert look()["grace"].value == 30.0


# Clouds


@pytest.mark.parametrize(
    ("name", "cloud", "variable"),
    [
        ("aws", Aws, "AWS_EC2_METADATA_SERVICE_ENDPOINT"),
        ("gcp", Gcp, "GCE_METADATA_HOST"),
        ("azure", Azure, "AZURE_METADATA_SERVICE_ENDPOINT"),
    ],
)
def test_a_metadata_service(
    monkeypatch: pytest.MonkeyPatch, name: str, cloud: type[Cloud], variable: str
) -> None:
    with cloud() as service:
        monkeypatch.setenv(variable, service.host if name == "gcp" else service.url)
        found = look(name)
        assert found["notices"].text == f"signals, {name}"
        assert found[name].state == "ok" and "a notice leaves" in found[name].text
        for fault in ("500", "garbage"):
            service.fault = fault
            found = look(name)
            assert found[name].state == "warning" and "otherwise SIGTERM" in found[name].todo


def test_an_unreachable_metadata_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    found = look("aws")["aws"]
    assert found.state == "warning" and "hop limit" in found.todo
    assert "no token" in found.text


# SLURM


def controller(monkeypatch: pytest.MonkeyPatch, job: str, requeue_exit: str = "(null)") -> None:
    def scontrol(*arguments: str) -> str:
        if not job:
            raise slurm.SlurmUnanswered("Unable to contact slurm controller")
        return CONFIG.format(requeue_exit) if "config" in arguments else job

    monkeypatch.setattr(slurm, "scontrol", scontrol)


@pytest.mark.parametrize(
    ("job", "requeue_exit", "state", "says"),
    [
        ("JobId=7 Requeue=1", "(null)", "ok", "job 7 can be requeued"),
        ("JobId=7 Requeue=0", "75-76", "ok", "requeues job 7 on 75 and 76"),
        ("JobId=7 Requeue=0", "75", "warning", "job 7 cannot be requeued"),
        ("", "", "warning", "Unable to contact"),
    ],
)
def test_a_slurm_job(
    monkeypatch: pytest.MonkeyPatch, job: str, requeue_exit: str, state: str, says: str
) -> None:
    controller(monkeypatch, job, requeue_exit)
    found = look("slurm", environ={"SLURM_JOB_ID": "7"})["SLURM"]
    assert found.state == state and says in found.text


def test_an_array_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    controller(monkeypatch, "JobId=9 Requeue=1")
    environ = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert "job 7_3" in look("slurm", environ=environ)["SLURM"].text


@pytest.mark.parametrize(("value", "number"), [("4", 4), ("", 1), ("odd", 1)])
def test_nodes(value: str, number: int) -> None:
    assert nodes({"SLURM_JOB_NUM_NODES": value}) == number
