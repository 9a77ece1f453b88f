"""Process limits."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from elastic_ckpt.cli.doctor.findings import Finding
from elastic_ckpt.cli.doctor.machine import check_limits
from tests.checkpoints import tree

Look = Callable[..., dict[str, Finding]]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Return the findings with these limits, by name; other limits are infinite."""
    (tmp_path / "fabric").mkdir()

    def ask(
        workers: int = 1, gpus: bool = False, pattern: str = "core", **limits: int
    ) -> dict[str, Finding]:
        def getrlimit(which: int) -> tuple[int, int]:
            known = {getattr(resource, f"RLIMIT_{name}"): value for name, value in limits.items()}
            return known.get(which, resource.RLIM_INFINITY), resource.RLIM_INFINITY

        monkeypatch.setattr(resource, "getrlimit", getrlimit)
        (tmp_path / "core_pattern").write_text(pattern + "\n")
        found = check_limits(
            workers,
            gpus=gpus,
            core_pattern=tmp_path / "core_pattern",
            fabric=tmp_path / "fabric",
        )
        return {one.what: one for one in found}

    return ask


@pytest.mark.parametrize(
    ("limit", "workers", "state"),
    [(1023, 1, "warning"), (1024, 60, "ok"), (1024, 61, "warning"), (1040, 61, "ok")],
)
def test_open_files(look: Look, limit: int, workers: int, state: str) -> None:
    found = look(workers, NOFILE=limit)["open files"]
    assert (found.state, found.value, found.unit) == (state, limit, "count")
    if state == "warning":
        assert f"LimitNOFILE={max(1024, 64 + 16 * workers)}" in found.todo
    assert look()["open files"].state == "ok"


@pytest.mark.parametrize(
    ("pattern", "limits", "state"),
    [
        ("core", {}, "warning"),
        ("/var/core/%p", {}, "warning"),
        ("|/usr/lib/systemd/systemd-coredump %P", {}, "ok"),
        ("core", {"CORE": 0}, "ok"),
        ("core", {"CORE": 10**6}, "ok"),
    ],
)
def test_core_dumps(look: Look, pattern: str, limits: dict[str, int], state: str) -> None:
    found = look(pattern=pattern, **limits)["core dumps"]
    assert found.state == state and ("LimitCORE=0" in found.todo) == (state == "warning")


def test_locked_memory_is_for_gpus_on_infiniband(look: Look, tmp_path: Path) -> None:
    assert "locked memory" not in look(MEMLOCK=65536)
    assert look(gpus=True, MEMLOCK=65536)["locked memory"].state == "ok"
    (tmp_path / "fabric/mlx5_0").mkdir()
    found = look(gpus=True, MEMLOCK=65536)["locked memory"]
    assert found.state == "warning" and "InfiniBand" in found.text
    assert look(gpus=True)["locked memory"].state == "ok"


def test_the_temporary_directory(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # short enough to be used
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        assert look()[str(place)].state == "ok" and tree(place) == {}

        def refuse(*given: Any) -> NoReturn:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "mkfifo", refuse)
        found = look()[str(place)]
        assert found.state == "problem" and "TMPDIR" in found.todo and tree(place) == {}
    finally:
        place.rmdir()


def test_a_too_long_tmpdir_is_not_used(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 61)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert {"/tmp", str(long)} & look().keys() == {"/tmp"}
