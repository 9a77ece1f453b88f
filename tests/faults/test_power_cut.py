"""A power cut at any moment of a save, on the simulated disk of ``power_cut``.

The save's system calls are recorded once; the model of the disk then yields the trees after
a cut, and each is made real and looked at as a restart would.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import MODEL, tree
from tests.faults import syscalls
from tests.faults.aftermath import Aftermath, State, prepare, without_waiting_for_the_disk
from tests.faults.power_cut import (
    Fates,
    Link,
    Move,
    NotModelled,
    Recording,
    Sync,
    Tree,
    Unlink,
    Write,
    places,
    put_on_disk,
    read_from_disk,
    record,
    states,
)
from tests.faults.store_writer import NEW, OLD, Farm, save
from tests.faults.syscalls import RECORDED_TOO, UNKNOWN_TO_US, CannotTrace

pytestmark = pytest.mark.one_torch

SEED = int(os.environ.get("ELASTIC_CKPT_TEST_SEED", "20261123"))
SAMPLE = 400
"""Of the states in which the save has not returned; those after it are all tried always."""


@dataclass
class Scene:
    """A recorded save, and the looks that were had at what it may leave.

    ``broken`` is an invalid checkpoint that stood in the new one's place before.
    """

    scratch: Path
    recording: Recording
    common: State
    broken: dict[str, bytes | str] | None = None
    _known: dict[int, tuple[int, list[str]]] = field(default_factory=dict)

    @property
    def trees(self) -> int:
        """Return the distinct trees that were checked."""
        return len(self._known)

    def violations(self, recording: Recording, cases: list[tuple[int, Fates]]) -> Iterator[str]:
        """Yield complaints for each (position in the log, fates of unsynced changes)."""
        for end, fates in cases:
            newest, complaints = self._look(recording.tree(end, fates))
            if end == len(recording.log) and newest != NEW:
                complaints = [f"the save had returned, but the newest is {newest}", *complaints]
            if complaints:
                yield "\n    ".join([describe(recording, end, fates), *complaints])

    def _look(self, found: Tree) -> tuple[int, list[str]]:
        key = hash(tuple(found.items()))
        if key not in self._known:
            root = self.scratch / "found"
            put_on_disk(found, root)
            try:
                after = Aftermath(root, self.common, broken=self.broken)
                newest = after.newest({OLD, NEW})
                after.go_on(clean_first=True)
            finally:
                shutil.rmtree(root)
            self._known[key] = newest, after.complaints
        return self._known[key]


def describe(recording: Recording, end: int, fates: Fates) -> str:
    printed = [f"{fate.value}: {_brief(recording.log[at])}" for at, fate in sorted(fates.items())]
    before = "the end" if end == len(recording.log) else _brief(recording.log[end])
    return f"power cut before step {end} ({before}); " + ("; ".join(printed) or "nothing lost")


def _brief(step: object) -> str:
    return repr(step) if len(repr(step)) < 100 else f"{repr(step)[:80]}...)"


# -- recording ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    if not syscalls.have_strace():
        pytest.skip("strace is not installed")
    made = Farm(tmp_path_factory.mktemp("farm"))
    try:
        yield made
        assert not made.children()
    finally:
        made.close()


def recorded(farm: Farm, scratch: Path, spoil: Callable[[Path], None] | None = None) -> Scene:
    """Record one undisturbed save, as the disk saw it."""
    root, log = scratch / "job", scratch / "log"
    common = prepare(root)
    broken = None
    if spoil is not None:
        spoil(root)
        broken = tree(JobDirectory.at(root).checkpoint(0, NEW))
    before = read_from_disk(root)
    pid = farm.start("save", root, scratch / "said")
    try:
        with syscalls.attached(pid, log, also=(*RECORDED_TOO, *UNKNOWN_TO_US)):
            pass
    except CannotTrace as error:
        pytest.skip(f"strace may not attach here: {error}")
    finally:
        code = farm.wait(pid)
    assert (code, (scratch / "said").read_text()) == (0, "")
    recording = record(root, before, syscalls.parse(log))
    # The model knows every call that mattered: played in full it gives the very tree.
    assert recording.tree(len(recording.log), {}) == read_from_disk(root)
    return Scene(scratch, recording, common, broken)


@pytest.fixture(scope="module")
def scene(farm: Farm, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return recorded(farm, tmp_path_factory.mktemp("save"))


@pytest.fixture(scope="module")
def scene_over(farm: Farm, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    def spoil(root: Path) -> None:
        save(root, NEW)
        os.truncate(JobDirectory.at(root).checkpoint(0, NEW) / MODEL, 3)

    return recorded(farm, tmp_path_factory.mktemp("over"), spoil)


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    with without_waiting_for_the_disk():
        yield


# -- the save ----------------------------------------------------------------------------------


def all_cases(recording: Recording, dice: random.Random) -> list[tuple[int, Fates]]:
    return [(end, fates) for end in places(recording) for fates in states(recording, end, dice)]


def check(scene: Scene, cases: list[tuple[int, Fates]], capsys: pytest.CaptureFixture[str]) -> None:
    bad = list(scene.violations(scene.recording, cases))
    with capsys.disabled():
        print(f"\nseed {SEED}: {len(cases)} states after a power cut, ", end="")
        print(f"{scene.trees} different trees, {len(scene.recording.log)} steps of the save")
    assert not bad, f"{len(bad)} of {len(cases)} states:\n" + "\n".join(bad[:20])


def check_sample(scene: Scene, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(SEED)
    cases = all_cases(scene.recording, dice)
    during = [case for case in cases if case[0] < len(scene.recording.log)]
    after = [case for case in cases if case[0] == len(scene.recording.log)]
    assert after
    check(scene, [*dice.sample(during, min(size, len(during))), *after], capsys)


def test_a_sample_of_power_cuts(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    check_sample(scene, SAMPLE, capsys)


def test_a_sample_of_power_cuts_over_an_invalid_one(
    scene_over: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    check_sample(scene_over, SAMPLE // 4, capsys)


@pytest.mark.faults_full
def test_every_power_cut(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    check(scene, all_cases(scene.recording, random.Random(SEED)), capsys)


@pytest.mark.faults_full
def test_every_power_cut_over_an_invalid_one(
    scene_over: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    check(scene_over, all_cases(scene_over.recording, random.Random(SEED)), capsys)


# -- the check can fail ------------------------------------------------------------------------


def is_of_file(sync: Sync) -> bool:
    return not sync.of_directory


def is_of_directory(sync: Sync) -> bool:
    return sync.of_directory


def is_of_seal(sync: Sync) -> bool:
    return "manifest.json" in sync.path


def is_of_job_directory(sync: Sync) -> bool:
    return sync.path == "."


@pytest.mark.parametrize("unwanted", [is_of_file, is_of_directory, is_of_seal, is_of_job_directory])
def test_missing_sync_is_detected(scene: Scene, unwanted: Callable[[Sync], bool]) -> None:
    careless = scene.recording.without(unwanted)
    assert len(careless.log) < len(scene.recording.log)
    end = len(careless.log)
    cases = [(end, fates) for fates in states(careless, end, random.Random(SEED))]
    assert next(scene.violations(careless, cases), None) is not None


def test_publishing_before_the_sync_is_detected(scene: Scene) -> None:
    """All syncs come, but after the rename: only a cut in between can show it."""
    log = scene.recording.log
    publish = max(place for place, step in enumerate(log) if isinstance(step, Move))
    before = [step for step in log[:publish] if isinstance(step, Sync)]
    rest = [step for step in log[:publish] if not isinstance(step, Sync)]
    late = Recording(
        scene.recording.entries,
        scene.recording.data,
        [*rest, log[publish], *before, *log[publish + 1 :]],
    )
    end = len(rest) + 1
    cases = [(end, fates) for fates in states(late, end, random.Random(SEED))]
    assert next(scene.violations(late, cases), None) is not None
    # and once it has returned nothing is wrong
    assert not list(scene.violations(late, [(len(late.log), {})]))


# -- the model ---------------------------------------------------------------------------------


def found(log: list, end: int | None = None) -> set[tuple[tuple[str, bytes | None], ...]]:
    """Return all trees that can be found after these steps on a disk with two directories."""
    entries: dict[int, dict[str, int]] = {0: {"a": 1, "b": 2}, 1: {}, 2: {}}
    recording = Recording(entries, dict.fromkeys((3, 4), b""), log)
    end = len(log) if end is None else end
    return {
        tuple((name, data) for name, data in recording.tree(end, fates).items() if data is not None)
        for fates in states(recording, end, random.Random(1), 200)
    }


WRITTEN = [Link(1, "x", 3), Write(3, 0, b"12"), Write(3, 2, b"34")]
SYNC_FILE = Sync(3, "a/x", of_directory=False)
SYNC_A = Sync(1, "a", of_directory=True)
SYNC_B = Sync(2, "b", of_directory=True)
MOVED = Move(1, "x", 2, "y", 3)


def test_an_unsynced_file_may_be_absent_empty_torn_or_full_of_zeros() -> None:
    contents = {dict(tree).get("a/x") for tree in found(WRITTEN)}
    assert contents.issuperset({None, b"", b"12", b"1234", b"\0\x0034", b"12\0\0", b"123"})


def test_a_synced_file_may_still_have_no_name() -> None:
    assert found([*WRITTEN, SYNC_FILE]) == {(), (("a/x", b"1234"),)}


def test_a_synced_name_may_still_have_no_contents() -> None:
    trees = found([*WRITTEN, SYNC_A])
    assert (("a/x", b""),) in trees
    assert () not in trees


def test_a_file_that_is_synced_with_its_name_is_there() -> None:
    assert found([*WRITTEN, SYNC_FILE, SYNC_A]) == {(("a/x", b"1234"),)}


def test_a_rename_is_one_name_or_the_other_until_its_target_is_synced() -> None:
    kept = [*WRITTEN, SYNC_FILE, SYNC_A, MOVED]
    either = {(("a/x", b"1234"),), (("b/y", b"1234"),)}
    assert found(kept) == either
    assert found([*kept, SYNC_A]) == either
    assert found([*kept, SYNC_B]) == {(("b/y", b"1234"),)}


def test_a_removed_name_may_come_back_until_its_directory_is_synced() -> None:
    gone = [*WRITTEN, SYNC_FILE, SYNC_A, Unlink(1, "x")]
    assert found(gone) == {(), (("a/x", b"1234"),)}
    assert found([*gone, SYNC_A]) == {()}


def test_unmodelled_call_is_rejected(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for line in (
        f"1 copy_file_range(3<{tmp_path}/a>, NULL, 4<{tmp_path}/b>, NULL, 5, 0) = 5",
        f'1 write(9<{tmp_path}/a>, "", 0) = 0',
        f'1 rename("{hexed("/elsewhere")}", "{hexed(f"{tmp_path}/a")}") = 0',
    ):
        log.write_text(line + "\n")
        with pytest.raises(NotModelled):
            record(tmp_path, {"a": b"", "b": b""}, syscalls.parse(log))


def hexed(text: str) -> str:
    """Escape text as strace does."""
    return "".join(f"\\x{byte:02x}" for byte in text.encode())
