"""The mirror on a store in memory: what it copies, in which order, and what it survives."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.errors import BucketFailed, BucketRefused
from elastic_ckpt.jobdir.retention_file import note_rule
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.supervisor.saves import mirror as mirroring
from elastic_ckpt.supervisor.saves.mirror import Mirror
from elastic_ckpt.supervisor.settings import MirrorSettings, RunSettings
from tests.buckets import Hooked, claim, failing, memory_store
from tests.checkpoints import MODEL, flip_bit, make_checkpoint, open_job

BOUND = 20.0


class Bench:
    """A job directory, its mirror, and what was said; one turn of the loop at a time."""

    def __init__(self, root: Path) -> None:
        self.job = open_job(root / "job")
        self.job.identity()
        self.store = Hooked(memory_store())
        self.said: list[str] = []
        self.mirrors: list[Mirror] = []

    def start(self, retention: Retention | None = None, *, is_place: bool = False) -> Mirror:
        settings = RunSettings(
            directory=self.job.root, script=Path("x"), args=(), name="job", node="n",
            retention=retention or Retention(),
            mirror=MirrorSettings(self.store.url, is_place=is_place),
        )  # fmt: skip
        made = Mirror(
            settings, self.store, "run", Journal(self.job, "n"), lambda: 0, self.said.append,
            lambda: None, lambda: None,
        )  # fmt: skip
        self.mirrors.append(made)
        made.start()
        return made

    def steps(self) -> list[int]:
        return [one.seal.step for one in catalog.listed(self.store)]

    def until(self, condition: Callable[[], bool]) -> None:
        """Turn the loop until it is so; each turn sees something new on the disk."""
        limit = time.monotonic() + BOUND
        while not condition():
            assert time.monotonic() < limit, (self.steps(), self.said)
            for one in self.mirrors:
                one.serve(object())
            time.sleep(0.01)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(mirroring, "RETRY_SECONDS", (0.01, 0.01))
    made = Bench(tmp_path)
    yield made
    for one in made.mirrors:
        one.close(lambda: 0.0)


def no_time() -> float:
    return 0.0


def some_time() -> Callable[[], float]:
    limit = time.monotonic() + BOUND
    return lambda: limit - time.monotonic()


def test_the_newest_is_copied_and_the_owner_ends(bench: Bench) -> None:
    for step in (10, 20):
        make_checkpoint(bench.job, step)
    mirror = bench.start()
    bench.until(lambda: bench.steps() == [20])
    make_checkpoint(bench.job, 30)
    bench.until(lambda: bench.steps() == [30, 20])
    mirror.close(some_time())
    assert "step 30, sealed" in mirror.serve(None)
    assert claim(bench.store).number == 2


def test_what_is_there_is_not_sent_again(bench: Bench) -> None:
    make_checkpoint(bench.job, 10)
    bench.start().close(some_time())
    bench.store.asked.clear()
    bench.start().close(some_time())
    assert bench.steps() == [10]
    assert "upload" not in bench.store.asked


def test_a_session_has_copies_of_its_own(bench: Bench) -> None:
    make_checkpoint(bench.job, 10)
    fold = bench.job.session("fold0")
    fold.root.mkdir(parents=True)
    make_checkpoint(fold, 7, session="fold0")
    bench.start().close(some_time())
    assert bench.steps() == [10]
    assert [one.seal.step for one in catalog.listed(bench.store, "fold0")] == [7]
    assert catalog.sessions(bench.store) == ["", "fold0"]


def test_a_store_that_fails_is_tried_again_and_said_once(bench: Bench) -> None:
    make_checkpoint(bench.job, 10)
    tries = 0

    def fail_at_first(name: str, key: str) -> None:
        nonlocal tries
        if name == "put_new" and key.startswith("seals/") and (tries := tries + 1) < 4:
            raise BucketFailed("cannot create the seal")

    bench.store.before = fail_at_first
    mirror = bench.start()
    bench.until(lambda: bench.steps() == [10])
    mirror.serve(None)
    assert [line for line in bench.said if "cannot create" in line] == bench.said[:1]


def test_a_damaged_checkpoint_is_left_out_with_a_line(bench: Bench) -> None:
    flip_bit(make_checkpoint(bench.job, 10) / MODEL)
    bench.start()
    bench.until(lambda: any("left out" in line for line in bench.said))
    assert "elastic-ckpt verify --full" in " ".join(bench.said)
    make_checkpoint(bench.job, 20)
    bench.until(lambda: bench.steps() == [20])


def test_retention_is_the_runs(bench: Bench) -> None:
    mirror = bench.start(Retention(last=2))
    for step in (10, 20, 30):
        make_checkpoint(bench.job, step)
        bench.until(lambda step=step: bench.steps()[:1] == [step])  # type: ignore[misc]
    bench.until(lambda: bench.steps() == [30, 20])
    mirror.close(some_time())


def test_without_one_it_is_the_scripts(bench: Bench) -> None:
    note_rule(bench.job, Retention(last=1))
    mirror = bench.start()
    for step in (10, 20):
        make_checkpoint(bench.job, step)
        bench.until(lambda step=step: bench.steps() == [step])  # type: ignore[misc]
    note_rule(bench.job, Retention(last=5))  # the next Session's
    make_checkpoint(bench.job, 30)
    bench.until(lambda: bench.steps() == [30, 20])
    mirror.close(some_time())


@pytest.mark.parametrize("error", [BucketRefused, BucketFailed])
def test_a_store_that_deletes_nothing_gets_its_copies_and_is_named_once(
    bench: Bench, error: type[Exception]
) -> None:
    def refuse(name: str, key: str) -> None:
        if name == "delete":
            raise error("cannot delete objects: not permitted")

    bench.store.before = refuse
    mirror = bench.start(Retention(last=1))
    for step in (10, 20, 30):
        make_checkpoint(bench.job, step)
        bench.until(lambda step=step: step in bench.steps())  # type: ignore[misc]
    mirror.close(some_time())
    assert bench.steps() == [30, 20, 10]
    assert [line for line in bench.said if "old checkpoints stay there" in line] == bench.said


@pytest.mark.parametrize("is_place", [False, True])
def test_an_owner_that_was_taken_over_stops(bench: Bench, is_place: bool) -> None:
    """With a directory the job trains on; where the bucket is the place, the run has lost it."""
    make_checkpoint(bench.job, 10)
    mirror = bench.start(is_place=is_place)
    bench.until(lambda: bench.steps() == [10] and "sealed" in mirror.serve(None))
    claim(bench.store, "elsewhere")
    make_checkpoint(bench.job, 20)
    bench.until(lambda: ": off: " in mirror.serve(None))
    assert "run elsewhere" in mirror.serve(None)
    assert bool(mirror.lost) is is_place


def test_a_job_that_goes_back_takes_the_bucket_with_it(bench: Bench) -> None:
    """A fall-back within the run, or a load of an older one: what it left is not the newest."""
    for step in (10, 20):
        make_checkpoint(bench.job, step)
        if step == 20:
            mirror = bench.start()
            bench.until(lambda: bench.steps() == [20])
    bench.job.checkpoint(0, 20).rename(bench.job.root / "aside")
    bench.until(lambda: bench.steps() == [10, 20])
    assert [one.superseded for one in catalog.listed(bench.store)] == [False, True]
    shutil.rmtree(bench.job.root / "aside")
    make_checkpoint(bench.job, 20)  # the same step again, by another way
    bench.until(lambda: bench.steps() == [20, 10, 20])
    mirror.close(some_time())
    newest = catalog.newest(bench.store)
    assert newest is not None
    assert newest.attempt == read_manifest(bench.job.checkpoint(0, 20)).attempt


def test_a_place_lacks_what_could_not_be_copied(bench: Bench) -> None:
    make_checkpoint(bench.job, 10)
    mirror = bench.start(is_place=True)
    bench.until(lambda: bench.steps() == [10])
    assert mirror.lacks  # nobody has asked yet
    mirror.flush()
    bench.until(lambda: mirror.flushed)
    assert not mirror.lacks
    bench.store.before = failing("put_new", "seals/")
    make_checkpoint(bench.job, 20)
    mirror.flush()
    bench.until(lambda: "failing" in mirror.serve(None))
    assert not mirror.flushed
    assert "lacks it: failing for" in mirror.lacks
    bench.store.before = lambda *_: None
    bench.until(lambda: mirror.flushed)
    assert not mirror.lacks


def test_an_older_copy_gives_way_when_time_is_short(bench: Bench) -> None:
    """After a notice only the newest counts."""
    make_checkpoint(bench.job, 10, contents={f"modeling/{n}": b"x" * 9_000_000 for n in range(2)})
    first = []

    def slow(name: str, key: str) -> None:
        if name == "upload" and not first:
            first.append(key)
            make_checkpoint(bench.job, 20)
            bench.mirrors[-1].hurry()

    bench.store.before = slow
    mirror = bench.start()
    bench.until(lambda: 20 in bench.steps())
    assert bench.steps() == [20]
    mirror.close(some_time())
    assert bench.steps() == [20]


def test_a_copy_is_finished_if_the_newer_one_would_not_fit(bench: Bench) -> None:
    """The deadline is near: a copy that is not finished is worth nothing."""
    make_checkpoint(bench.job, 10, contents={f"modeling/{n}": b"x" * 9_000_000 for n in range(2)})
    first = []

    def slow(name: str, key: str) -> None:
        if name == "upload" and len(first) < 2:
            first.append(key)
            make_checkpoint(bench.job, 20, contents={"modeling/0": b"y" * 9_000_000})
            bench.mirrors[-1].hurry(lambda: 1e-9)

    bench.store.before = slow
    mirror = bench.start()
    bench.until(lambda: 20 in bench.steps())
    assert bench.steps() == [20, 10]
    mirror.close(some_time())


def test_closing_without_time_says_what_stays(bench: Bench) -> None:
    make_checkpoint(bench.job, 10)
    bench.store.before = failing("put_new", "seals/")
    mirror = bench.start()
    bench.until(lambda: "failing" in mirror.serve(None))
    mirror.close(no_time)
    assert "what s3://bucket/job lacks stays on the disk" in bench.said[-1]
    assert read_manifest(bench.job.checkpoint(0, 10))
