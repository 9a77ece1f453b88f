"""A load from a bucket: what the engine does not name is not brought, and damage is set aside."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.ranks.reading import LocalRank
from elastic_ckpt.checkpoint.bucket.tier import BucketTier
from elastic_ckpt.checkpoint.disk.tier import DiskAttempt
from elastic_ckpt.checkpoint.manifest import CHUNK_BYTES, EngineInfo
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.checkpoint.tier import Ranges, Ref
from elastic_ckpt.errors import CannotReshard, CheckpointError, CheckpointRejected
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.state.load import choose, load_given, load_newest
from elastic_ckpt.util.files import remove_tree
from tests.buckets import Hooked, claim, memory_store
from tests.checkpoints import make_header, open_job, tick

LARGE = "modeling/large"
DATA = secrets.token_bytes(2 * CHUNK_BYTES + 100)


class RangedEngine:
    """Reads the last bytes of a file alone, and then does what the test wants."""

    info = EngineInfo("torch")

    def __init__(self, then: Callable[[Path], object] = lambda directory: None) -> None:
        self.read = b""
        self._then = then

    def ranges(self, directory: Path) -> Ranges:
        assert (directory / LARGE).stat().st_size == len(DATA)
        assert (directory / LARGE).open("rb").read(CHUNK_BYTES) == DATA[:CHUNK_BYTES]
        return {LARGE: [(len(DATA) - 5, len(DATA))]}

    def load(self, directory: Path) -> str:
        self.read = (directory / LARGE).read_bytes()[-5:]
        self._then(directory)
        return ""


class Bench:
    """A bucket with checkpoints of steps 10, 20 and 30, and a machine that has nothing of them."""

    def __init__(self, place: Path) -> None:
        self.job = open_job(place)
        self.store = Hooked(memory_store())
        owned = claim(self.store)
        self.tier = BucketTier(self.store, self.job, lambda: owned, LocalRank(0, 1))
        self.refs = {step: self._save(step) for step in (10, 20, 30)}
        remove_tree(self.job.control / "bucket")
        self.fetched: list[str] = []
        self.store.before = self._count
        self.runtime: Any = SimpleNamespace(
            job=self.job,
            peers=Peers(0, 1, None, 60.0),
            journal=Journal(self.job, "here"),
            say=print,
            memory=None,
            bucket=SimpleNamespace(url=self.store.url, tier=lambda _: self.tier),
            durable=self.tier,
            home=str(self.job.home),
            has_looked=False,
            candidate=None,
            fence=Fence(self.job),
        )

    def _count(self, name: str, key: str) -> None:
        if name == "get_range" and key.endswith(LARGE):
            self.fetched.append(key)

    def _save(self, step: int) -> Ref:
        attempt = self.tier.begin(step, len(DATA))
        made = make_header(DiskAttempt(self.job, attempt.ref.attempt, step))
        header = msgspec.structs.replace(made, world_size=1, data_parallel_size=1)
        part = attempt.part(0)
        part.write(LARGE, DATA)
        return attempt.seal(header, part.finish(1, header), Retention(last=5))

    def damage(self, step: int, at: int) -> None:
        key = SealKey.parse("", self.refs[step].name)
        assert key is not None
        changed = bytearray(DATA)
        changed[at] ^= 1
        self.store.put(key.data + LARGE, bytes(changed))

    def look(self) -> None:
        """Do what ``resume_place`` does."""
        self.runtime.candidate, self.runtime.has_looked = choose(self.runtime), True


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "job")


def test_a_chunk_that_no_rank_reads_stays_in_the_bucket(bench: Bench) -> None:
    bench.damage(30, CHUNK_BYTES + 3)
    engine = RangedEngine()
    loaded = load_newest(bench.runtime, engine)
    assert loaded is not None and loaded.seal.step == 30
    assert engine.read == DATA[-5:] and len(bench.fetched) == 2


@pytest.mark.parametrize("at", [3, len(DATA) - 1])
def test_damage_in_what_a_rank_reads_sets_it_aside(bench: Bench, at: int) -> None:
    bench.damage(30, at)
    engine = RangedEngine()
    loaded = load_newest(bench.runtime, engine)
    assert loaded is not None and loaded.seal.step == 20 and engine.read == DATA[-5:]
    events = [event for event in read_journal(bench.job) if event.name == "quarantined"]
    assert len(events) == 1 and "does not match its checksum" in events[0].data["reason"]
    newest = bench.tier.newest()
    assert newest is not None and newest.key == (0, 20)


def test_a_script_that_knows_the_place_is_told_to_run_again(bench: Bench) -> None:
    bench.damage(30, len(DATA) - 1)
    bench.look()
    with pytest.raises(CheckpointRejected, match=r"epoch-0_step-30: .*rerun the same command"):
        load_newest(bench.runtime, RangedEngine())
    bench.runtime.has_looked = False
    bench.look()
    loaded = load_newest(bench.runtime, RangedEngine())
    assert loaded is not None and loaded.seal.step == 20


def test_a_place_that_was_told_is_loaded(bench: Bench) -> None:
    bench.look()
    assert len(bench.fetched) == 1
    engine = RangedEngine()
    loaded = load_newest(bench.runtime, engine)
    assert loaded is not None and loaded.seal.step == 30
    assert engine.read == DATA[-5:] and len(bench.fetched) == 2


def test_a_given_checkpoint_with_damage_is_not_set_aside(bench: Bench) -> None:
    bench.damage(30, len(DATA) - 1)
    path = bench.job.root / "epoch-0_step-30"
    with pytest.raises(CheckpointRejected, match="does not match its checksum"):
        load_given(bench.runtime, RangedEngine(), path)
    newest = bench.tier.newest()
    assert newest is not None and newest.key == (0, 30)


def test_a_chunk_that_changes_during_the_load_is_rejected(bench: Bench) -> None:
    def change(directory: Path) -> None:
        tick()
        with (directory / LARGE).open("r+b") as file:
            file.seek(len(DATA) - 3)
            file.write(b"?")

    with pytest.raises(CheckpointRejected, match="changed while it was loaded"):
        load_newest(bench.runtime, RangedEngine(change))


class MisfitEngine(RangedEngine):
    """Cannot say what it reads."""

    def ranges(self, directory: Path) -> Ranges:
        raise KeyError("layer")


def test_an_engine_that_cannot_name_ranges_fails_as_its_load_does(bench: Bench) -> None:
    with pytest.raises(CheckpointError, match="does not fit epoch-0_step-30: 'layer'"):
        load_newest(bench.runtime, MisfitEngine())
    other = MisfitEngine()
    other.info = EngineInfo("torch", plugin="dtensor")
    with pytest.raises(CannotReshard):
        load_newest(bench.runtime, other)
