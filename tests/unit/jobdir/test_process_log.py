"""The structured log of a process: its fields, its rotation, and that it never blocks."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_ckpt.jobdir import process_log
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.process_log import ProcessLog, read_process_logs
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.messages import Joined
from elastic_ckpt.supervisor.agent_client import summary
from tests.checkpoints import open_job
from tests.waiting import until

pytestmark = pytest.mark.one_torch

log = logging.getLogger("elastic_ckpt.tested")
ENDS_SECONDS = 20.0
"""The default bound is half a second; a busy machine may need longer."""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[JobDirectory]:
    logger = logging.getLogger("elastic_ckpt")
    before = list(logger.handlers)
    yield open_job(tmp_path / "job")
    left = [
        one for one in logger.handlers if one not in before and "elastic" in type(one).__module__
    ]
    for handler in left:
        logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    assert left == []


def of_node(job: JobDirectory, **known: int) -> ProcessLog:
    return ProcessLog.of_node(job, "supervisor", "here", lambda: known)


def kept(job: JobDirectory, name: str = "supervisor-here.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.logs / name).read_text().splitlines() if line]


def test_fields_of_a_line(job: JobDirectory) -> None:
    started = of_node(job, incarnation=3).begin()
    log.info("rank %d runs", 1, extra={"rank": 1})
    started.end(ENDS_SECONDS)
    (line,) = kept(job)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert abs(line.pop("monotonic") - time.monotonic()) < 60
    assert line == {
        "level": "INFO", "process": "supervisor", "node": "here", "pid": os.getpid(),
        "incarnation": 3, "rank": 1, "message": "rank 1 runs",
    }  # fmt: skip
    assert (job.logs / "supervisor-here.jsonl").stat().st_mode & 0o777 == 0o600


def test_log_of_a_worker_is_next_to_its_output(job: JobDirectory) -> None:
    known = {"incarnation": 3, "rank": 1, "step": 7}
    started = ProcessLog.of_worker(job, "here", 3, 1, lambda: known).begin()
    log.info("saving")
    started.end(ENDS_SECONDS)
    (line,) = kept(job, "000003/00001.jsonl")
    assert (line["process"], line["incarnation"], line["rank"], line["step"]) == ("worker", 3, 1, 7)


def test_exception_has_its_traceback(job: JobDirectory) -> None:
    started = of_node(job).begin()
    try:
        raise ValueError("the data of this step")
    except ValueError:
        log.exception("the script raised")
    started.end(ENDS_SECONDS)
    (line,) = kept(job)
    assert line["level"] == "ERROR"
    assert "test_process_log.py" in line["error"]
    assert line["error"].endswith("ValueError: the data of this step")


def test_record_that_cannot_be_formatted_is_counted_as_lost(job: JobDirectory) -> None:
    class Shy:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def unknown() -> dict[str, int]:
        raise OSError("the board is gone")

    started = ProcessLog.of_node(job, "supervisor", "here", unknown).begin()
    log.info("%s", Shy())
    log.info("%d and %d", 1)
    log.info("a lone surrogate \udcff and a NUL \0")
    log.info("long " + "x" * 1_000_000)
    started.end(ENDS_SECONDS)
    lines = kept(job)
    assert [line["message"][:20] for line in lines] == [
        "a lone surrogate \\ud", "2 lines could not be", "long xxxxxxxxxxxxxxx",
    ]  # fmt: skip
    assert len(lines[-1]["message"]) < 5000
    assert "incarnation" not in lines[-1]


def test_long_log_is_rotated(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_log, "MAX_FILE_BYTES", 5000)
    started = of_node(job).begin()
    for number in range(200):
        log.info("line %d", number)
    started.end(ENDS_SECONDS)
    files = sorted(job.logs.iterdir())
    assert [path.name for path in files] == ["supervisor-here.jsonl", "supervisor-here.jsonl.1"]
    assert all(path.stat().st_size < 6000 for path in files)
    read = [line.message for line in read_process_logs(job)]
    assert read[-1] == "line 199"
    assert read == [f"line {number}" for number in range(200 - len(read), 200)]


def test_next_process_starts_a_new_line_after_a_torn_one(job: JobDirectory) -> None:
    job.require(job.logs)
    (job.logs / "supervisor-here.jsonl").write_bytes(b'{"time":"2026-01-0')
    started = of_node(job).begin()
    log.info("here")
    started.end(ENDS_SECONDS)
    assert [line.message for line in read_process_logs(job)] == ["here"]


def test_logged_messages_leave_out_the_script_s_arguments() -> None:
    joined = Joined("run", "job", "identity", "n1", terms={"the script's arguments": "--key k3y"})
    assert summary(joined) == "Joined run_id=run job=job identity=identity head=n1"
    ended = Ended(incarnation=2, kind=EndKind.CRASHED, rank=1, tail=("k3y",))
    assert summary(ended) == "Ended incarnation=2 kind=CRASHED rank=1"


# -- the script's own logging -------------------------------------------------------------------


def test_nothing_reaches_the_root_logger(job: JobDirectory) -> None:
    root = logging.handlers.BufferingHandler(100)
    logging.getLogger().addHandler(root)
    try:
        started = of_node(job).begin()
        log.error("ours")
        logging.getLogger("another").error("theirs")
        started.end(ENDS_SECONDS)
    finally:
        logging.getLogger().removeHandler(root)
    assert [record.getMessage() for record in root.buffer] == ["theirs"]
    assert [line["message"] for line in kept(job)] == ["ours"]


def test_forked_child_writes_nothing_and_waits_for_nothing(job: JobDirectory) -> None:
    started = of_node(job).begin()
    child = os.fork()
    if child == 0:
        log.info("from the child")
        started.end(ENDS_SECONDS)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    log.info("from the parent")
    started.end(ENDS_SECONDS)
    assert [line["message"] for line in kept(job)] == ["from the parent"]


# -- disks --------------------------------------------------------------------------------------


def test_full_disk_loses_lines_and_reports_how_many(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, write = threading.Event(), os.write

    def sometimes(fd: int, data: bytes) -> int:
        return write(fd, data[:10]) if full.is_set() else write(fd, data)

    started = of_node(job).begin()
    log.info("before")
    until(lambda: (job.logs / "supervisor-here.jsonl").exists() and len(kept(job)) == 1)
    monkeypatch.setattr(os, "write", sometimes)
    full.set()
    for _ in range(3):
        log.info("lost")
    until(lambda: (job.logs / "supervisor-here.jsonl").read_bytes().count(b'{"time"') == 4)
    full.clear()
    log.info("after")
    started.end(ENDS_SECONDS)
    said = [line.message for line in read_process_logs(job)]
    assert said == ["before", "after", "3 lines could not be written"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount")
def test_full_file_system(tmp_path: Path) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True)
    try:
        job = open_job(place / "job")
        started = of_node(job).begin()
        for number in range(process_log.MAX_WAITING):
            log.info("line %d %s", number, "x" * 4000)
        started.end(ENDS_SECONDS)
        read = [line.message for line in read_process_logs(job)]
        assert 10 < len(read) < 300
        assert read[0].startswith("line 0 ")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_hanging_disk_delays_no_logging(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, write = threading.Event(), os.write

    def hang(fd: int, data: bytes) -> int:
        stuck.wait(60)
        return write(fd, data)

    monkeypatch.setattr(os, "write", hang)
    started = of_node(job).begin()
    began = time.monotonic()
    for number in range(process_log.MAX_WAITING + 50):
        log.info("line %d", number)
    started.end()
    logging.shutdown()  # as Python does at its end
    took = time.monotonic() - began
    stuck.set()
    started.end(ENDS_SECONDS)
    assert took < 30  # it would be 60
    said = [line["message"] for line in kept(job)]
    lost = [int(message.split()[0]) for message in said if "could not be written" in message]
    assert sum(lost) in (49, 50)  # one line was out of the queue
    assert len(said) - len(lost) + sum(lost) == process_log.MAX_WAITING + 50


HANGS_AT_EXIT = """
import logging, os, sys, threading
from pathlib import Path
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.process_log import ProcessLog
os.write = lambda fd, data: threading.Event().wait()
ProcessLog.of_node(JobDirectory(Path(sys.argv[1])), "supervisor", "here", dict).begin()
logging.getLogger("elastic_ckpt.x").info("never written")
"""


def test_python_exits_while_the_disk_hangs(job: JobDirectory) -> None:
    command = [sys.executable, "-c", HANGS_AT_EXIT, str(job.root)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


# -- a directory of another user ----------------------------------------------------------------


def test_links_and_fifos_are_not_followed(job: JobDirectory, tmp_path: Path) -> None:
    job.require(job.logs)
    outside, name = tmp_path / "secret", job.logs / "supervisor-here.jsonl"
    outside.write_text("keep\n")
    for put in (
        lambda: name.symlink_to(outside),
        lambda: name.hardlink_to(outside),
        lambda: os.mkfifo(name),
        lambda: name.mkdir(),
    ):
        put()
        started = of_node(job).begin()
        log.info("here")
        started.end(ENDS_SECONDS)
        assert read_process_logs(job) == []
        assert outside.read_text() == "keep\n"
        name.rmdir() if name.is_dir() and not name.is_symlink() else name.unlink()


def test_fifo_with_a_reader_gets_nothing(job: JobDirectory) -> None:
    job.require(job.logs)
    os.mkfifo(job.logs / "supervisor-here.jsonl")
    reader = os.open(job.logs / "supervisor-here.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    started = of_node(job).begin()
    log.info("here")
    started.end(ENDS_SECONDS)
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_link_in_place_of_the_directory_is_not_followed(job: JobDirectory, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    job.logs.symlink_to(tmp_path / "elsewhere")
    started = of_node(job).begin()
    log.info("here")
    started.end(ENDS_SECONDS)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "elsewhere" / "agent-x.jsonl").write_text("{}\n")
    assert read_process_logs(job) == []


def test_invalid_log_lines_are_skipped(job: JobDirectory) -> None:
    started = of_node(job).begin()
    log.info("ours")
    started.end(ENDS_SECONDS)
    good = (job.logs / "supervisor-here.jsonl").read_bytes()
    bad = [
        b"", b"\xff\xfe", b"[" * 50_000, b'{"time": 1}', b"null", b'"' + b"x" * 200_000 + b'"',
        good.replace(b"Z", b"\\u001b[2J"), good.replace(b'"pid":', b'"pid":1e'),
    ]  # fmt: skip
    (job.logs / "agent-there.jsonl").write_bytes(b"\n".join(bad))
    assert [line.message for line in read_process_logs(job)] == ["ours"]


def test_reading_is_bounded(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_log, "MAX_READ_BYTES", 4000)
    for node in ("a", "b", "c"):
        started = ProcessLog.of_node(job, "agent", node, dict).begin()
        for number in range(100):
            log.info("line %d", number)
        started.end(ENDS_SECONDS)
    read = read_process_logs(job)
    assert 10 < len(read) < 40
    assert read[-1].message == "line 99"  # the end of a file, not its beginning
