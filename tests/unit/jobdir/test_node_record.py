"""Who runs: identities that outlive their process, records, node names, requests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from elastic_ckpt.jobdir.node_record import (
    NodeRecord,
    NoticeRecord,
    ProcessIdentity,
    job_records,
    node_name,
    read_record,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.save_requests import ask_for_save, remove_requests, waiting_requests
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.util.files import TEMPORARY
from tests.checkpoints import open_job

SAY_WHO = """
import msgspec
from elastic_ckpt.jobdir.node_record import ProcessIdentity

print(msgspec.json.encode(ProcessIdentity.current()).decode(), flush=True)
"""


def make_record(since: float = 1.0, node: str = "here", run_number: int = 0) -> NodeRecord:
    return NodeRecord(
        job="tested", run_id="run", node=node, owner=ProcessIdentity.current(), since=since,
        state=RunState.DRAINING, notice=NoticeRecord("signal", "SIGTERM", 12.5),
        run_number=run_number,
    )  # fmt: skip


def test_this_process_is_alive() -> None:
    me = ProcessIdentity.current()
    assert (me.host, me.pid) == (socket.gethostname(), os.getpid())
    assert me.is_local and me.is_alive() is True


def test_a_dead_process_is_not_alive() -> None:
    said = subprocess.run(
        [sys.executable, "-c", SAY_WHO], check=True, capture_output=True, timeout=60
    )
    dead = msgspec.json.decode(said.stdout, type=ProcessIdentity)
    assert dead.is_local and dead.is_alive() is False


def test_a_zombie_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", SAY_WHO], stdout=subprocess.PIPE)
    assert process.stdout is not None
    identity = msgspec.json.decode(process.stdout.readline(), type=ProcessIdentity)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert psutil.pid_exists(process.pid)
        assert identity.is_alive() is False
    finally:
        process.communicate()


@pytest.mark.parametrize("seconds", [-3600.0, -5.0, 5.0])
def test_a_reused_pid_is_another_process(seconds: float) -> None:
    me = ProcessIdentity.current()
    former = msgspec.structs.replace(me, started=me.started + seconds)
    assert former.is_alive() is False


def test_a_process_on_another_host_is_unknown() -> None:
    elsewhere = msgspec.structs.replace(ProcessIdentity.current(), boot_id="another")
    assert not elsewhere.is_local
    assert elsewhere.is_alive() is None


def test_a_step_of_the_wall_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that the system library tells for a start moves with the clock; we do not."""
    me = ProcessIdentity.current()
    original = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: original(self) + 3600.0)
    assert me.is_alive() is True


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = make_record()
    record.write(tmp_path / "here.json")
    assert read_record(tmp_path / "here.json") == record


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"job": 1}', b"\xff\xfe"])
def test_an_invalid_record_is_none(tmp_path: Path, data: bytes) -> None:
    job = open_job(tmp_path)
    job.node_record("here").write_bytes(data)
    assert read_record(job.node_record("here")) is None
    assert read_record(job.node_record("missing")) is None
    assert job_records(job) == []


def test_the_latest_run_is_first(tmp_path: Path) -> None:
    job = open_job(tmp_path)
    for node, since in (("a", 2.0), ("b", 3.0), ("c", 1.0)):
        make_record(since, node).write(job.node_record(node))
    job.node_record("torn").write_bytes(b"{")
    assert [record.node for record in job_records(job)] == ["b", "a", "c"]
    assert job_records(JobDirectory.at(tmp_path / "missing")) == []


def test_a_record_that_is_being_written_is_not_one_more(tmp_path: Path) -> None:
    """Its file is there under another name, and stays if the writer is killed."""
    job = open_job(tmp_path)
    make_record(2.0).write(job.node_record("here"))
    make_record(1.0).write(job.nodes / f"{TEMPORARY}here.json")
    assert [record.since for record in job_records(job)] == [2.0]


def test_head_of_the_latest_run_is_first_whatever_its_clock_shows(tmp_path: Path) -> None:
    """A head that had been killed was shown, since its clock was ahead of the next one's."""
    job = open_job(tmp_path)
    for node, since, number in (("former", 900.0, 1), ("head", 100.0, 2), ("member", 901.0, 0)):
        make_record(since, node, number).write(job.node_record(node))
    assert [record.node for record in job_records(job)] == ["head", "former", "member"]


def test_a_node_is_named_by_the_flag_then_slurm_then_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n17")
    assert node_name("given") == "given"
    assert node_name() == node_name("") == "n17"
    monkeypatch.delenv("SLURMD_NODENAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "host.example")
    assert node_name() == "host.example"


@pytest.mark.parametrize(
    ("given", "safe"),
    [
        ("gpu-01.cluster_a", "gpu-01.cluster_a"),
        ("../../etc", ".._.._etc"),
        ("a/b c\n\0d", "a_b_c__d"),
        ("*?[x]", "___x_"),
    ],
)
def test_a_node_name_is_safe_as_a_file_name(given: str, safe: str) -> None:
    assert node_name(given) == safe


@pytest.mark.parametrize("given", [".", ".."])
def test_a_node_name_is_never_a_directory_of_its_own(job: JobDirectory, given: str) -> None:
    """The lock of a node is a file in ``locks/``."""
    assert not job.node_lock(node_name(given)).exists()


def test_requests_wait_until_they_are_removed(job: JobDirectory) -> None:
    assert not waiting_requests(job)
    names = {ask_for_save(job).name, ask_for_save(job).name}
    assert waiting_requests(job) == names
    assert waiting_requests(job) == names
    remove_requests(job, [*names, "save-of-another"])
    assert list(job.requests.iterdir()) == []
