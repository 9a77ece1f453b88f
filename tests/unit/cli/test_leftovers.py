"""What is in memory only: ``status`` and ``doctor`` list it, ``prune --memory`` deletes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.cli import leftovers as shown
from elastic_ckpt.cli.doctor import memory as doctor_memory
from elastic_ckpt.cli.doctor.memory import check_memory
from elastic_ckpt.errors import ExitCode
from tests.checkpoints import open_job
from tests.memory_tiers import own, snapshot
from tests.unit.cli.test_app import Command, cli

__all__ = ["cli"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "memory"
    found.mkdir()
    real = shown.leftovers
    monkeypatch.setattr(shown, "leftovers", lambda places: real([found]))
    return found


def test_it_is_listed_with_job_step_size_and_age_and_deleted_by_one_command(
    cli: Command, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, gone = open_job(tmp_path / "job"), open_job(tmp_path / "gone")
    held = own(place, gone)
    snapshot(gone, held.tier, 16)
    assert cli("status", job.root, "--json").json["memory_only"] == []
    assert cli("prune", "--memory", held.tier.root).code == ExitCode.UNAVAILABLE  # in use
    held.release(remove=False)
    shutil.rmtree(gone.root)

    [row] = cli("status", job.root, "--json").json["memory_only"]
    assert (row["job"], row["step"], row["path"]) == (str(gone.root), 16, str(held.tier.root))
    assert row["bytes"] > 0 and 0 <= row["age_seconds"] < 60
    page = "".join(cli("status", "-v", job.root).out.split())  # a long path is broken anywhere
    assert f"step16of{gone.root}isinmemoryonly:" in page
    assert f"deleteit:{row['command'].replace(' ', '')}" in page

    monkeypatch.setattr(doctor_memory, "room_bytes", lambda path: 10**12)
    *_, found = check_memory(None, shm=place)
    assert found.state == "warning" and row["command"] in found.todo
    assert f"step 16 of {gone.root} is in memory only:" in found.text

    said = cli(*row["command"].split()[1:], "--dry-run")
    assert said.code == 0 and said.out.startswith(f"would go  {held.tier.root}")
    assert cli("prune", "--memory", held.tier.root, "--keep-last", 1).code == ExitCode.USAGE
    assert held.tier.root.exists()
    assert cli(*row["command"].split()[1:]).out.endswith(f"step 16 of {gone.root}\n")
    assert not held.tier.root.exists()
    assert cli("prune", "--memory", job.root).code == ExitCode.USAGE


def test_a_nodes_share_is_no_checkpoint_to_bring_to_the_disk(
    cli: Command, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node was taken out of its job, which has gone on without it."""
    job = open_job(tmp_path / "job")
    held = own(place, job)
    sealed = snapshot(job, held.tier, 16)
    assert sealed is not None
    sealed.generation.close(msgspec.structs.replace(sealed.seal, share=Share(0, 1)))
    held.release(remove=False)
    [row] = cli("status", job.root, "--json").json["memory_only"]
    assert row["is_share"] and row["step"] == 16
    monkeypatch.setattr(doctor_memory, "room_bytes", lambda path: 10**12)
    *_, found = check_memory(None, shm=place)
    assert found.text.startswith(f"a node's share of step 16 of {job.root} is in memory: ")
    assert "rerun" not in found.todo and found.todo.endswith(row["command"])
