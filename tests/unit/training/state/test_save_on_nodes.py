"""A save of two nodes with one rank each: to whose memory it goes, and what is in each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import EngineInfo
from elastic_ckpt.checkpoint.memory import tier as memory_tier
from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.checkpoint.nodes.tier import NodesMemory
from elastic_ckpt.errors import StorageFailed, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.state import save
from elastic_ckpt.training.state.target import _check_suits, begin_attempt
from tests.checkpoints import make_header, open_job

STATE_BYTES = 1_000_000


class Writes(Engine):
    """Writes what a test wants, by rank: ``part:PATH``, or ``path:PATH`` without the part."""

    info = EngineInfo("tested")

    def __init__(
        self, *files: tuple[str, ...], by_path: bool = True, reads_peers_files: bool = False
    ) -> None:
        self._files = files
        self._by_path = by_path
        self._reads = reads_peers_files

    def save(self, directory: Path, part: Any, copies: Any = None) -> None:
        for one in self._files[part.rank]:
            how, _, path = one.partition(":")
            if how == "part":
                part.write(path, b"part")
            else:
                (directory / path).parent.mkdir(exist_ok=True)
                (directory / path).write_bytes(b"path")

    def load(self, directory: Path) -> str:
        raise AssertionError("nothing is loaded here")

    def state_bytes(self) -> int:
        return STATE_BYTES

    @property
    def by_path(self) -> bool:
        return self._by_path

    @property
    def reads_peers_files(self) -> bool:
        return self._reads


Saves = Callable[[Engine], list[Any]]
"""Has both ranks save, and returns each one's tier, or error."""


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


@pytest.fixture
def saves(job: JobDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Saves]:
    def header(runtime: Any, info: EngineInfo, snapshot: Any, attempt: str) -> Any:
        return make_header(DiskAttempt(job, attempt, 7), engine=info)

    monkeypatch.setattr(save, "make_header", header)
    for rank in range(2):
        tier_of(tmp_path, rank).mkdir(mode=0o700)

    def both(engine: Engine) -> list[Any]:
        store, results = dist.HashStore(), [None, None]

        def enter(rank: int) -> None:
            runtime = make_runtime(job, tmp_path, Peers(rank, 2, store, 20.0))
            try:
                results[rank] = save_on_rank(runtime, engine)
            except StorageFailed as error:
                results[rank] = error

        threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results

    yield both


def make_runtime(job: JobDirectory, place: Path, peers: Peers) -> Any:
    share = Share(peers.rank, 1, f"n{peers.rank}", 1)
    return SimpleNamespace(
        peers=peers, job=job, bucket=None, durable=DiskTier(job), rewound_to=None, last_bytes=None,
        memory=NodesMemory(tier_of(place, peers.rank), share, acts=True), memory_problem="",
        say=lambda _: None, state=dict, retain=SimpleNamespace(rule=Retention()),
    )  # fmt: skip


def save_on_rank(runtime: Any, engine: Engine) -> str:
    snapshot: Any = SimpleNamespace(rank_state=None, running_states={})
    target = begin_attempt(runtime, engine, 7)
    if target.ref.tier == "memory":
        taken = save._write(runtime, engine, snapshot, target, None)
        save._seal(runtime, engine, taken)
    return target.ref.tier


def tier_of(place: Path, rank: int) -> Path:
    return place / f"memory{rank}"


def sealed(place: Path, rank: int) -> list[set[str]]:
    """Return the files of each sealed generation of a node."""
    found = NodesMemory(tier_of(place, rank), Share(rank, 1), acts=True).sealed()
    return [{entry.path for entry in one.seal.files} for one in found]


@pytest.mark.parametrize(
    ("by_path", "reads_peers_files", "tier"),
    [
        (False, False, "memory"),
        (True, False, "memory"),
        (True, True, "disk"),
        (False, True, "disk"),
    ],
)
def test_what_an_engine_reads_of_other_ranks_decides_where_it_saves(
    saves: Saves, by_path: bool, reads_peers_files: bool, tier: str
) -> None:
    engine = Writes((), (), by_path=by_path, reads_peers_files=reads_peers_files)
    assert saves(engine) == [tier, tier]


def test_an_engine_that_says_nothing_saves_to_the_disk() -> None:
    assert Engine.reads_peers_files.fget(SimpleNamespace()) is True


@pytest.mark.parametrize(("by_path", "tier"), [(True, "disk"), (False, "memory")])
def test_each_node_needs_room_for_all_that_may_be_written_there(
    saves: Saves, by_path: bool, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two generations of half of the state fit, of all of it do not."""
    monkeypatch.setattr(memory_tier, "room_bytes", lambda _: int(1.5 * STATE_BYTES))
    assert saves(Writes((), (), by_path=by_path)) == [tier, tier]


def test_each_node_has_what_its_ranks_wrote_by_path(saves: Saves, tmp_path: Path) -> None:
    engine = Writes(("part:modeling/a", "path:modeling/index.json"), ("path:precision/b",))
    assert saves(engine) == ["memory", "memory"]
    own = {"modeling/a", "modeling/index.json", "running_states.json"}
    assert [sealed(tmp_path, rank) for rank in range(2)] == [[own], [{"precision/b"}]]


@pytest.mark.parametrize(
    "files",
    [
        (("path:modeling/config.json",), ("path:modeling/config.json",)),
        (("part:modeling/config.json",), ("path:modeling/config.json",)),
        (("path:modeling/config.json",), ("part:modeling/config.json",)),
        (("part:modeling/config.json",), ("part:modeling/config.json",)),
    ],
)
def test_a_path_that_two_nodes_wrote_is_refused_and_nothing_is_sealed(
    saves: Saves, tmp_path: Path, files: tuple[tuple[str, ...], ...]
) -> None:
    """Of two files of one path a checkpoint would lose one."""
    results = saves(Writes(*files))
    expected = "rank 1 could not save: modeling/config.json was written on another node as well"
    assert [str(one) for one in results] == [expected] * 2
    assert all(isinstance(one, StorageFailed) for one in results)
    assert [sealed(tmp_path, rank) for rank in range(2)] == [[], []]


@pytest.mark.parametrize(
    ("has_bucket", "local", "reads_peers_files", "refused"),
    [
        (True, "1", True, True),
        (True, "1", False, False),
        (True, "2", True, False),
        (False, "1", True, False),
    ],
)
def test_nodes_without_a_common_directory_cannot_read_each_others_files(
    monkeypatch: pytest.MonkeyPatch, has_bucket: bool, local: str,
    reads_peers_files: bool, refused: bool,
) -> None:  # fmt: skip
    """Rank 0 would merge the indexes of its own node alone, and nothing could be loaded."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    runtime: Any = SimpleNamespace(
        bucket=object() if has_bucket else None, peers=SimpleNamespace(world_size=2)
    )
    engine = Writes((), (), reads_peers_files=reads_peers_files)
    with pytest.raises(UsageError, match="share no directory") if refused else nullcontext():
        _check_suits(runtime, engine)
