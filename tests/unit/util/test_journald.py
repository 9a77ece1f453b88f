"""Priorities go to the journal only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ckpt.util import journald
from elastic_ckpt.util.journald import Line, Priority, is_journal, marked, priority_of, warning


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    is_journal.cache_clear()


def test_lines_have_a_priority() -> None:
    assert priority_of("a line") is Priority.INFO
    assert priority_of(warning("a line")) is Priority.WARNING
    assert priority_of(Line("a line", Priority.ERROR)) is Priority.ERROR
    assert warning("a line") == "a line"


def test_each_line_is_marked_in_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journald, "is_journal", lambda fd: True)
    assert marked("one\ntwo", Priority.ERROR) == "<3>one\n<3>two"
    assert marked("one", Priority.INFO) == "one"


def _error(stderr: int, stream: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
    if stream is not None:
        environment["JOURNAL_STREAM"] = stream
    command = [sys.executable, "-m", "elastic_ckpt", "run", "--dir", "x", "nowhere.py"]
    subprocess.run(command, stderr=stderr, env=environment, timeout=30, check=False)


def test_error_is_marked_only_where_descriptor_2_is_the_journal(tmp_path: Path) -> None:
    """The variable is inherited by processes whose output goes elsewhere."""
    for matches in (True, False):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            found = os.fstat(theirs.fileno())
            stream = f"{found.st_dev}:{found.st_ino if matches else found.st_ino + 1}"
            _error(theirs.fileno(), stream)
            line = ours.recv(4096)
        assert line.startswith(b"<3>elastic-ckpt: error: " if matches else b"elastic-ckpt: error")
    with open(tmp_path / "log", "wb") as file:
        _error(file.fileno(), None)
    assert (tmp_path / "log").read_text().startswith("elastic-ckpt: error: ")
