"""The files of what workers printed."""

from __future__ import annotations

from pathlib import Path

from elastic_ckpt.jobdir import worker_logs as logs
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import KEPT_INCARNATIONS, LogWriter, forget_old_logs, log_files


def write(job: JobDirectory, incarnation: int, rank: int, data: bytes) -> None:
    writer = LogWriter(job, incarnation, rank)
    writer.write(data)
    writer.close()


def test_logs_are_found_in_order_and_read_safely(job: JobDirectory) -> None:
    write(job, 2, 0, b"second\n")
    write(job, 1, 10, b"ten\n")
    write(job, 1, 2, b"two \x1b[2J\xff\n")
    found = log_files(job)
    assert [(log.incarnation, log.rank) for log in found] == [(1, 2), (1, 10), (2, 0)]
    (line,) = found[0].lines()
    assert line.startswith("two ") and "\x1b" not in line


def test_long_log_keeps_its_end(job: JobDirectory, monkeypatch) -> None:
    monkeypatch.setattr(logs, "MAX_LOG_BYTES", 100)
    writer = LogWriter(job, 1, 0)
    for number in range(40):
        writer.write(b"line %d ............\n" % number)
    (log,) = log_files(job)
    kept = list(log.lines())
    assert kept[-1].startswith("line 39")
    assert 5 <= len(kept) <= 14
    assert sum(path.stat().st_size for path in log.path.parent.iterdir()) < 300
    writer.close()


def test_tail_is_short_and_narrow(job: JobDirectory) -> None:
    write(job, 1, 0, b"".join(b"%d " % number + b"x" * 5000 + b"\n" for number in range(50)))
    tail = log_files(job)[0].tail()
    assert len(tail) <= 20
    assert tail[-1].startswith("49 ") and max(map(len, tail)) <= 303  # with "..." at the end


def test_logs_of_old_incarnations_are_removed(job: JobDirectory) -> None:
    for number in range(1, KEPT_INCARNATIONS + 6):
        write(job, number, 0, b"x\n")
    forget_old_logs(job)
    kept = [log.incarnation for log in log_files(job)]
    assert kept == list(range(6, KEPT_INCARNATIONS + 6))


def test_links_are_not_followed(job: JobDirectory, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    job.logs.symlink_to(tmp_path / "elsewhere")
    write(job, 1, 0, b"x\n")
    assert not list((tmp_path / "elsewhere").iterdir())
    assert log_files(job) == []


def test_file_of_another_user_is_left_alone(job: JobDirectory, tmp_path: Path) -> None:
    write(job, 1, 0, b"x\n")
    secret = tmp_path / "secret"
    secret.write_text("keep\n")
    (job.logs / "000001" / "00001.log").symlink_to(secret)
    write(job, 1, 1, b"y\n")
    assert secret.read_text() == "keep\n"
