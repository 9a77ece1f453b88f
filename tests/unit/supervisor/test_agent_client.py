"""The agent's directory: made for a run, and removed by a later one if the run could not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.supervisor import agent_client as agent_process


@pytest.fixture
def place(monkeypatch, tmp_path: Path) -> Path:
    short = Path("/tmp") / f"s{os.getpid()}"
    short.mkdir()
    monkeypatch.setattr(agent_process.tempfile, "gettempdir", lambda: str(short))
    yield short
    for path in sorted(short.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    short.rmdir()


def gone() -> ProcessIdentity:
    """A process that has ended."""
    code = (
        "import sys, msgspec; from elastic_ckpt.jobdir.node_record import ProcessIdentity;"
        "sys.stdout.buffer.write(msgspec.json.encode(ProcessIdentity.current()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    return msgspec.json.decode(said, type=ProcessIdentity)


def leave(place: Path, name: str, owner: ProcessIdentity) -> Path:
    left = place / name
    left.mkdir()
    os.mkfifo(left / "out-0")
    (left / "supervisor.json").write_bytes(msgspec.json.encode(owner))
    return left


def test_a_dead_runs_directory_is_removed_and_a_live_ones_kept(place: Path) -> None:
    dead = leave(place, "eckpt-dead", gone())
    alive = leave(place, "eckpt-alive", ProcessIdentity.current())
    other = place / "eckpt-unknown"
    other.mkdir()
    made = Path(agent_process._make_scratch())
    assert not dead.exists()
    assert alive.exists() and other.exists()
    assert made.parent == place and made.stat().st_mode & 0o777 == 0o700


def test_links_among_old_directories_are_not_followed(place: Path, tmp_path: Path) -> None:
    leave(tmp_path, "precious", gone())
    (place / "eckpt-link").symlink_to(tmp_path / "precious")
    agent_process._make_scratch()
    assert (tmp_path / "precious" / "out-0").exists()
