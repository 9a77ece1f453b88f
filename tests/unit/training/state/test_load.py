"""A load: what it takes, what it sets aside, and what it keeps from being deleted meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.disk import tier as disk_tier
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import EngineInfo, Manifest
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.checkpoint.prune import prune
from elastic_ckpt.checkpoint.quarantine import rejected
from elastic_ckpt.checkpoint.verify import is_verified, read_manifest
from elastic_ckpt.errors import (
    CannotReshard,
    CheckpointError,
    CheckpointRejected,
    NoUsableCheckpoint,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.slot import Source
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.state.candidate import Readable
from elastic_ckpt.training.state.load import load_given, load_newest, load_on_rank
from tests.checkpoints import MODEL, flip_bit, make_checkpoint, open_job, tick


class Engine:
    """Loads nothing, and does what the test wants in the meantime."""

    info = EngineInfo("torch")

    def __init__(self, meanwhile: Any = lambda directory: None) -> None:
        self.loaded: list[str] = []
        self._meanwhile = meanwhile

    def save(self, directory: Path, part: Any) -> None:
        raise AssertionError("nothing is saved here")

    def check(self, directory: Path, rank: int) -> None:
        raise AssertionError("nothing is saved here")

    def load(self, directory: Path) -> str:
        self._meanwhile(directory)
        self.loaded.append(directory.name)
        return ""

    def state_bytes(self) -> int:
        return 0


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    job = open_job(tmp_path / "job")
    for step in (10, 20, 30, 40):
        make_checkpoint(job, step)
    return job


@pytest.fixture
def runtime(job: JobDirectory) -> Any:
    """One process alone, as far as a load looks at it."""
    return SimpleNamespace(
        job=job,
        peers=Peers(0, 1, None, 60.0),
        journal=Journal(job, "here"),
        say=print,
        memory=None,
        bucket=None,
        durable=DiskTier(job),
        home=str(job.home),
        has_looked=False,
        fence=Fence(job),
    )


def steps(job: JobDirectory) -> list[int]:
    return [read_manifest(path).step for path in scan(job)]


def test_the_newest_is_loaded_and_counts_as_verified(job: JobDirectory, runtime: Any) -> None:
    engine = Engine()
    before = set(os.listdir("/proc/self/fd"))
    loaded = load_newest(runtime, engine)
    assert loaded is not None and isinstance(loaded.seal, Manifest)
    assert loaded.seal.step == 40
    assert (loaded.source, engine.loaded) == (Source.DISK, ["epoch-0_step-40"])
    assert is_verified(job, job.checkpoint(0, 40), loaded.seal)
    assert not is_verified(job, job.checkpoint(0, 30), read_manifest(job.checkpoint(0, 30)))
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_bad_checkpoint_is_set_aside_and_the_next_one_is_loaded(
    job: JobDirectory, runtime: Any
) -> None:
    flip_bit(job.checkpoint(0, 40) / MODEL)
    engine = Engine()
    load_newest(runtime, engine)
    assert engine.loaded == ["epoch-0_step-30"]
    [record] = rejected(job)
    assert MODEL in record.reason
    events = read_journal(job)
    names = [event.name for event in events]
    assert names == ["verified", "quarantined", "verified", "loaded", "resize"]
    assert [event.data.get("intact") for event in events] == [False, None, True, None, None]
    assert MODEL in events[0].data["why"] and events[3].data["step"] == 30


def test_two_bad_checkpoints_in_a_row_end_the_load(job: JobDirectory, runtime: Any) -> None:
    for step in (30, 40):
        flip_bit(job.checkpoint(0, step) / MODEL)
    engine = Engine()
    with pytest.raises(NoUsableCheckpoint, match="2 checkpoints in a row"):
        load_newest(runtime, engine)
    assert engine.loaded == [] and steps(job) == [20, 10]


def test_a_checkpoint_deleted_after_its_choice_is_not_set_aside(
    job: JobDirectory, runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many go, none is set aside, and the job does not end."""
    lock = disk_tier.ReadLock

    def delete_first(path: Path) -> Any:
        if path.name != "epoch-0_step-10":
            shutil.rmtree(path)
        return lock(path)

    monkeypatch.setattr(disk_tier, "ReadLock", delete_first)
    engine = Engine()
    load_newest(runtime, engine)
    assert engine.loaded == ["epoch-0_step-10"]
    assert rejected(job) == []
    assert not [event for event in read_journal(job) if event.name == "quarantined"]


def test_a_checkpoint_is_not_deleted_during_its_load(job: JobDirectory, runtime: Any) -> None:
    """Another process saves a newer one meanwhile; an open one stays until it is loaded."""

    def save_and_prune(directory: Path) -> None:
        make_checkpoint(job, 50)
        done = {one.step: one.why for one in prune(job, Retention(last=1))}
        assert done[20] == "it is open"

    load_given(runtime, Engine(save_and_prune), job.checkpoint(0, 20))
    assert steps(job) == [50, 20]
    prune(job, Retention(last=1))
    assert 50 in steps(job)


def test_a_checkpoint_that_changes_during_its_load_is_rejected(
    job: JobDirectory, runtime: Any
) -> None:
    def change(directory: Path) -> None:
        tick()
        flip_bit(directory / MODEL)

    path = job.checkpoint(0, 40)
    with pytest.raises(CheckpointRejected, match=r"changed while it was loaded.*rerun"):
        load_newest(runtime, Engine(change))
    assert not is_verified(job, path, read_manifest(path))


def test_a_backup_during_a_load_is_harmless(job: JobDirectory, runtime: Any) -> None:
    def backup(directory: Path) -> None:
        os.link(directory / MODEL, job.root / "backup")
        os.utime(directory / MODEL, (1, 1))

    found = load_newest(runtime, Engine(backup))
    assert found is not None and found.seal.step == 40
    assert rejected(job) == []


def test_a_job_without_checkpoints_starts_fresh(tmp_path: Path, runtime: Any) -> None:
    runtime.job = open_job(tmp_path / "new")
    runtime.durable = DiskTier(runtime.job)
    assert load_newest(runtime, Engine()) is None


def test_a_given_checkpoint_is_never_set_aside(job: JobDirectory, runtime: Any) -> None:
    flip_bit(job.checkpoint(0, 20) / MODEL)
    with pytest.raises(CheckpointRejected, match=r"epoch-0_step-20: .*checksum"):
        load_given(runtime, Engine(), job.checkpoint(0, 20))
    assert steps(job) == [40, 30, 20, 10] and rejected(job) == []


@pytest.mark.parametrize(
    ("plugin", "ranks", "why"),
    [
        ("", 3, "torch on 3 ranks"),
        ("GeminiPlugin", 4, "GeminiPlugin on 4 ranks"),
        ("GeminiPlugin", 1, "GeminiPlugin on 1 rank"),
    ],
)
def test_a_failed_reshard_names_plugins_and_sizes(
    job: JobDirectory, plugin: str, ranks: int, why: str
) -> None:
    def refuse(_: Path) -> None:
        raise AssertionError("shapes differ")

    engine = Engine(refuse)
    engine.info = EngineInfo("torch", plugin=plugin)
    loaded = Readable(read_manifest(job.checkpoint(0, 40)), Source.DISK, job.checkpoint(0, 40))
    with pytest.raises(CannotReshard) as caught:
        load_on_rank(engine, loaded, ranks)
    assert "epoch-0_step-40 was written by torch on 2 ranks" in str(caught.value)
    assert f"cannot be loaded by {why}: shapes differ; run with that layout" in str(caught.value)


def test_a_mismatch_at_the_same_size_is_the_scripts_fault(job: JobDirectory) -> None:
    def refuse(_: Path) -> None:
        raise AssertionError("shapes differ")

    seal = read_manifest(job.checkpoint(0, 40))
    loaded = Readable(seal, Source.DISK, job.checkpoint(0, 40))
    with pytest.raises(CheckpointError, match="does not fit epoch-0_step-40") as caught:
        load_on_rank(Engine(refuse), loaded, seal.world_size)
    assert not isinstance(caught.value, CannotReshard)
