"""Output to a descriptor that is not read: nothing waits, what is lost is counted."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time

import pytest

from elastic_ckpt.util import outlet
from elastic_ckpt.util.outlet import MAX_WAITING_BYTES, Outlet
from tests.waiting import until

LINE = b"x" * 99 + b"\n"


def report(count: int) -> str:
    return f"{count} bytes dropped"


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(fd)


def read_all(fd: int, ending: bytes) -> bytes:
    found = b""
    while not found.endswith(ending):
        found += os.read(fd, 65536)
    return found


def test_output_arrives_in_order(pipe) -> None:
    reading, writing = pipe
    shown = Outlet(writing, report)
    assert all(shown.put(f"{number}\n".encode()) for number in range(100))
    assert shown.flush(5.0)
    assert os.read(reading, 65536).split() == [str(number).encode() for number in range(100)]


def test_nothing_waits_for_a_paused_reader_and_every_lost_byte_is_counted(pipe) -> None:
    reading, writing = pipe
    shown = Outlet(writing, report)
    count = 3 * MAX_WAITING_BYTES // len(LINE)
    began = time.monotonic()
    for _ in range(count):
        shown.put(LINE)
    assert not shown.flush(0.1)
    assert time.monotonic() - began < 5.0
    assert os.get_blocking(writing)  # other processes share the flag

    found = read_all(reading, b"dropped\n")
    dropped = int(re.search(rb"(\d+) bytes dropped\n$", found)[1])
    kept = found[: found.rindex(b"\n", 0, -1) + 1]
    assert kept == LINE * (len(kept) // len(LINE))
    assert len(kept) + dropped == count * len(LINE)
    assert len(kept) > MAX_WAITING_BYTES - len(LINE)

    until(lambda: shown.put(b"again\n"))
    assert shown.flush(5.0)
    assert read_all(reading, b"again\n").endswith(b"again\n")


def test_shared_non_blocking_descriptor_loses_nothing(pipe) -> None:
    reading, writing = pipe
    os.set_blocking(writing, False)
    shown = Outlet(writing, report)
    for _ in range(5000):
        assert shown.put(LINE)
    assert not shown.flush(0.05)
    assert read_all(reading, LINE * 5000) == LINE * 5000
    assert not os.get_blocking(writing)


@pytest.mark.parametrize("gone", ["reader", "room"])
def test_refused_output_is_counted_and_raises_nothing(pipe, gone: str) -> None:
    reading, writing = pipe
    if gone == "reader":
        os.close(reading)
    fd = writing if gone == "reader" else os.open("/dev/full", os.O_WRONLY)
    shown = Outlet(fd, report)
    for _ in range(3):
        shown.put(LINE)
        assert not shown.flush(5.0)


def test_end_of_a_blocked_write_is_not_waited_for_twice(pipe) -> None:
    _, writing = pipe
    shown = Outlet(writing, report)
    for _ in range(2000):
        shown.put(LINE)
    assert not shown.flush(0.3)
    began = time.monotonic()
    assert not shown.flush(0.3)
    assert time.monotonic() - began < 0.2


PRINTS = """
import sys, warnings
from elastic_ckpt.util.outlet import unblocked_streams
with unblocked_streams(lambda count: f"{count} dropped"):
    for _ in range(40000):
        print("y" * 99)
        sys.stderr.write("z" * 99 + "\\n")
    warnings.warn("so it goes")
assert sys.stdout is sys.__stdout__
"""


def test_process_that_prints_to_a_paused_reader_ends(pipe) -> None:
    _, writing = pipe
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], stdout=writing, stderr=writing, timeout=20, check=False
    )
    assert done.returncode == 0


SAYS = """
from elastic_ckpt.util.outlet import standard_error
for _ in range(40000):
    standard_error().put(b"z" * 99 + b"\\n")
"""


def test_last_lines_of_a_rank_do_not_hold_up_its_end(pipe) -> None:
    reading, writing = pipe
    done = subprocess.run([sys.executable, "-c", SAYS], stderr=writing, timeout=20, check=False)
    assert done.returncode == 0
    few = SAYS.replace("40000", "3")
    subprocess.run([sys.executable, "-c", few], stderr=reading, timeout=20, check=False)
    done = subprocess.run([sys.executable, "-c", few], capture_output=True, timeout=20, check=False)
    assert done.stderr.count(b"z\n") == 3


def test_thread_that_cannot_be_started_costs_lines_only(pipe, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(outlet.threading.Thread, "start", refuse)
    shown = Outlet(pipe[1], report)
    assert shown.put(LINE)
    assert not shown.flush(0.05)


def test_command_that_fails_ends_although_nothing_reads_its_error(pipe) -> None:
    _, writing = pipe
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, LINE)
    os.set_blocking(writing, True)
    command = [sys.executable, "-m", "elastic_ckpt", "run", "--dir", "ck", "nowhere.py"]
    done = subprocess.run(command, stderr=writing, timeout=20, check=False)
    assert done.returncode == 64
