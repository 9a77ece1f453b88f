"""The check of a node before it takes part."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.supervisor.watch import node_check
from elastic_ckpt.supervisor.watch.node_check import (
    AGAIN_SECONDS,
    NodeCheck,
    NodeLook,
    check_disk,
    check_gpus,
    check_memory,
    failed_part,
)
from elastic_ckpt.util.gpus import NOT_INSTALLED, Device, Gpus
from tests.checkpoints import open_job

ONE = Device("H100", 80_000_000_000)


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def test_disk_that_keeps_what_is_written_passes_and_nothing_is_left(job: JobDirectory) -> None:
    job.node_check("n1").write_bytes(b"of a check that was killed")
    assert check_disk(job, "n1") == ""
    assert not job.node_check("n1").exists()


def test_disk_that_returns_something_else_fails(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_check, "read_bounded", lambda path, limit: b"other bytes")
    assert "does not have what was written to it" in check_disk(job, "n1")
    assert not job.node_check("n1").exists()


def test_disk_that_refuses_fails_with_its_reason(job: JobDirectory) -> None:
    job.node_check("n1").mkdir()
    parts = {"disk": lambda: check_disk(job, "n1")}
    assert failed_part(parts) == f"disk: {job.node_check('n1')}: {os.strerror(errno.EISDIR)}"


@pytest.mark.parametrize(("room", "why"), [(100, ""), (99, "needs 100 B")])
def test_memory_must_have_room_for_this_nodes_share(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, room: int, why: str
) -> None:
    newest: Any = SimpleNamespace(manifest=SimpleNamespace(total_bytes=200))
    monkeypatch.setattr(node_check, "newest_of_job", lambda job: newest)
    monkeypatch.setattr(node_check, "room_bytes", lambda place: room)
    found = check_memory(job, str(job.root / "tier"), 4)  # two generations of a quarter
    assert why in found and bool(found) is bool(why)
    assert check_memory(job, "", 4) == ""  # no memory tier


def test_memory_passes_while_the_size_of_a_checkpoint_is_unknown(job: JobDirectory) -> None:
    assert check_memory(job, str(job.root / "tier"), 1) == ""


@pytest.mark.parametrize(
    ("count", "found", "why"),
    [
        (0, Gpus(why="no driver"), ""),
        (2, Gpus((ONE, ONE)), ""),
        (2, Gpus((ONE,)), "1 of 2 answer"),
        (2, Gpus(why="GPU is lost"), "the driver does not answer: GPU is lost"),
        (2, Gpus(why=NOT_INSTALLED), ""),
    ],
)
def test_gpus_must_answer(
    monkeypatch: pytest.MonkeyPatch, count: int, found: Gpus, why: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert check_gpus(lambda: count, lambda: found) == why
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the job uses none
    assert check_gpus(lambda: count, lambda: found) == ""


def _refuses() -> str:
    raise PermissionError(errno.EACCES, "Permission denied", "/job")


def _breaks() -> str:
    raise ValueError("a bug")


def _hangs() -> str:
    time.sleep(60)
    return ""


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"a": lambda: "", "b": lambda: ""}, ""),
        ({"a": lambda: "", "b": lambda: "too little", "c": _breaks}, "b: too little"),
        ({"a": _refuses}, "a: /job: Permission denied"),
        ({"a": lambda: "", "b": _hangs, "c": _breaks}, "b: did not answer within 0.5 s"),
        ({"a": _breaks}, "a: ValueError('a bug')"),
        ({"a": lambda: os._exit(3)}, "a: ended without an answer"),
    ],
)
def test_the_part_that_fails_is_named(parts: dict[str, Callable[[], str]], why: str) -> None:
    assert failed_part(parts, 0.5 if _hangs in parts.values() else 20.0) == why


def test_memory_is_judged_only_while_no_worker_uses_it(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks = ["no room"]
    monkeypatch.setattr(node_check, "check_memory", lambda *_: lacks[0])
    settings: Any = SimpleNamespace(directory=job.root, node="n1", nodes=(1, 2))
    look = NodeLook(settings, "")
    assert look(idle=False) == ""  # as if it had passed: nothing is known yet
    assert look(idle=True) == "memory: no room" == look(idle=False)
    lacks[0] = ""
    assert look(idle=False) == "memory: no room"
    assert look(idle=True) == "" == look(idle=False)


def test_a_node_is_checked_once_and_again_while_it_fails() -> None:
    results = ["disk: no", "disk: no", ""]
    waiting: list[Callable[[], None]] = []
    check = NodeCheck(lambda idle: results.pop(0))
    assert check.unfit is None and check.is_due(5.0)
    check.begin(waiting.append, idle=True)
    assert not check.is_due(5.0) and not check.take(5.0)
    check.begin(waiting.append, idle=True)  # one at a time
    assert len(waiting) == 1
    waiting.pop()()
    assert check.take(6.0) and not check.take(6.0) and check.unfit == "disk: no"
    assert not check.is_due(6.0 + AGAIN_SECONDS - 1)
    assert check.is_due(6.0 + AGAIN_SECONDS)
    for _ in range(2):
        check.begin(waiting.append, idle=True)
        waiting.pop()()
        assert check.take(100.0)
    assert check.unfit == "" and not check.is_due(9999.0)


def test_a_check_that_breaks_lets_the_node_try() -> None:
    check = NodeCheck(lambda idle: _breaks())
    check.begin(lambda work: work(), idle=True)
    assert check.take(1.0) and check.unfit == ""
