"""Room for the memory tier, with memory tables and control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.cli.doctor import memory as memory_findings
from elastic_ckpt.cli.doctor.directory import CheckedPath
from elastic_ckpt.cli.doctor.findings import Finding
from elastic_ckpt.cli.doctor.memory import check_memory

GB = 10**9
KIB = 1024


class Machine:
    """A tmpfs of a given size, and files as in /proc and /sys."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proc, self.cgroups, self.shm = root / "proc", root / "cgroup", root / "shm"
        for place in (self.proc / "self", self.cgroups, self.shm):
            place.mkdir(parents=True)
        self.total, self.free, self.groups = 64 * GB, 32 * GB, "0::/\n"
        monkeypatch.setattr(os, "statvfs", lambda path: self._statvfs())
        monkeypatch.setattr(memory_findings, "room_bytes", lambda path: self.free)

    def _statvfs(self) -> Any:
        return SimpleNamespace(f_blocks=1, f_bavail=self.free // KIB, f_frsize=KIB)

    def limit(self, path: str, value: str) -> None:
        file = self.cgroups / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value + "\n")

    def look(self, state: int | None = None, held: int = 0) -> tuple[Finding, Finding]:
        (self.proc / "meminfo").write_text(f"MemTotal: {self.total // KIB} kB\n")
        (self.proc / "self/cgroup").write_text(self.groups)
        place = None if state is None else CheckedPath("/x", "/x", 1, "", state, None, held)
        tier, memory = check_memory(place, shm=self.shm, proc=self.proc, cgroups=self.cgroups)
        return tier, memory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize("state", [None, 0])
def test_without_a_checkpoint_the_largest_fitting_size_is_reported(
    machine: Machine, state: int | None
) -> None:
    tier, memory = machine.look(state)
    assert tier.state == memory.state == "ok"
    assert tier.text == "32.0 GB available: checkpoints of up to half that size fit"
    assert memory.text == "64.0 GB, not limited by a control group"


def test_dockers_default_size_is_a_warning(machine: Machine) -> None:
    machine.free = 64 * 2**20
    tier, _ = machine.look()
    assert tier.state == "warning" and "--shm-size" in tier.todo
    assert tier.text == "67.1 MB available, but two checkpoints must fit"


@pytest.mark.parametrize(
    ("state", "held", "expected"),
    [(16 * GB, 0, "ok"), (17 * GB, 0, "warning"), (17 * GB, 2 * GB, "ok")],
)
def test_two_checkpoints_must_fit_including_what_the_tier_holds(
    machine: Machine, state: int, held: int, expected: str
) -> None:
    tier, _ = machine.look(state, held)
    assert (tier.state, tier.value) == (expected, 32 * GB + held)
    assert ("--shm-size" in tier.todo) == (expected == "warning")


def test_a_larger_tmpfs_is_not_advised_if_memory_is_short(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_findings, "room_bytes", lambda path: 4 * GB)
    tier, _ = machine.look(3 * GB)
    assert tier.state == "warning" and tier.todo.startswith("free some memory")


def test_a_missing_or_read_only_tmpfs_is_a_warning(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *given: False)
    assert "not writable" in machine.look()[0].text

    def gone(path: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "statvfs", gone)
    tier, _ = machine.look()
    assert tier.state == "warning" and "--memory-dir off" in tier.todo


VERSIONS = [
    ("0::/docker/a\n", "docker/a/memory.max"),
    ("0::/docker/a\n", "memory.max"),  # a namespace of its own
    ("4:memory:/docker/a\n0::/x\n", "memory/docker/a/memory.limit_in_bytes"),
    ("4:cpu,memory:/docker/a\n", "memory/docker/memory.limit_in_bytes"),
]


@pytest.mark.parametrize(("groups", "file"), VERSIONS)
def test_a_limit_below_two_checkpoints_is_a_warning(
    machine: Machine, groups: str, file: str
) -> None:
    machine.groups = groups
    machine.limit(file, str(10 * GB))
    _, memory = machine.look(5 * GB)
    assert (memory.state, memory.value) == ("ok", 10 * GB)
    _, memory = machine.look(6 * GB)
    assert memory.state == "warning" and "MemoryMax=" in memory.todo
    assert "limits it to 10.0 GB" in memory.text and "take 12.0 GB" in memory.text


@pytest.mark.parametrize("value", ["max", str(2**63 - 4096), str(100 * GB), "odd"])
def test_no_limit(machine: Machine, value: str) -> None:
    machine.limit("memory.max", value)
    assert machine.look(60 * GB)[1].text.endswith("not limited by a control group")
