"""A save that is killed, or fails, at any of its system calls.

strace stops the save at the N-th call of a kind, for every N: it kills the process there, or has
the call fail. The kill comes before the call is carried out, so the kill at the next one is the
one after it.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import MODEL, make_attempt, tree
from tests.faults import syscalls
from tests.faults.aftermath import Aftermath, prepare, without_waiting_for_the_disk
from tests.faults.store_writer import FAILED, NEW, OLD, Farm, contents, save
from tests.faults.syscalls import EIO, KILL, MODES, Call, CannotTrace

pytestmark = pytest.mark.one_torch

SEED = int(os.environ.get("ELASTIC_CKPT_TEST_SEED", "20261123"))
MUST_HAVE = ("write", "sync", "rename", "open")
"""A trace without calls of one of these did not see the save."""


@dataclass(frozen=True)
class Case:
    """One call and what happens at it."""

    call: Call
    mode: str

    @property
    def kind(self) -> str:
        return f"{self.call.family}, {self.mode}"

    def __str__(self) -> str:
        return f"{self.mode} at {self.call}"


@dataclass(frozen=True)
class Scene:
    """What is killed or fails, and on which directory.

    Attributes:
        act: what the traced process does.
        set_up: what it finds besides the old checkpoint.
        cleans_first: whether the next save is always made by a new start.
    """

    name: str
    act: str
    set_up: Callable[[Path], None]
    cleans_first: bool = False

    def __str__(self) -> str:
        return self.name


def nothing(root: Path) -> None:
    pass


def invalid_in_its_place(root: Path) -> None:
    save(root, NEW)
    os.truncate(JobDirectory.at(root).checkpoint(0, NEW) / MODEL, 3)


def attempts_of_killed_runs(root: Path) -> None:
    """Make one that lacks only its seal, and one without the second rank's part."""
    job = JobDirectory.at(root)
    make_attempt(job, NEW, contents=contents(NEW))
    make_attempt(job, NEW - 1, contents=contents(NEW - 1), ranks=[0])


SCENES = [
    Scene("save", "save", nothing),
    Scene("save over an invalid one", "save", invalid_in_its_place),
    Scene("recovery", "recover", attempts_of_killed_runs, cleans_first=True),
]


class Bench:
    """One scene on a prepared job directory, played again and again from the same state."""

    def __init__(self, scratch: Path, farm: Farm, scene: Scene) -> None:
        self.farm, self.scene = farm, scene
        self._scratch = scratch
        self._prepared = scratch / "prepared"
        self._common = prepare(self._prepared)
        scene.set_up(self._prepared)
        place = JobDirectory.at(self._prepared).checkpoint(0, NEW)
        self._broken = tree(place) if place.exists() else None
        self.calls = self._undisturbed()

    def _undisturbed(self) -> list[Call]:
        root, log = self._fresh(), self._scratch / "log"
        code, printed = self._run(root, log, "", also=syscalls.UNKNOWN_TO_US)
        assert (code, printed) == (0, "")
        calls = syscalls.parse(log)
        assert not [call for call in calls if call.name in syscalls.UNKNOWN_TO_US]
        assert len({call.pid for call in calls}) == 1, "strace counts each thread's calls apart"
        found = syscalls.inside(calls, root)
        assert {call.family for call in found}.issuperset(MUST_HAVE)
        shutil.rmtree(root)
        return [normalised(call, root) for call in found]

    def cases(self) -> list[Case]:
        """Return every traced call in every mode."""
        return [Case(call, mode) for mode in MODES for call in self.calls]

    def run(self, case: Case) -> tuple[bool, list[str]]:
        """Return whether the case hit its call, and complaints."""
        root, log = self._fresh(), self._scratch / "log"
        inject = syscalls.injection(case.call, case.mode)
        code, printed = self._run(root, log, inject)
        missed = self._missed(case, root, log)
        complaints = [missed] if missed else []
        complaints += [*_outcome(case.mode, code, printed), *self._aftermath(case, root, code)]
        shutil.rmtree(root)
        return not missed, complaints

    def _aftermath(self, case: Case, root: Path, code: int) -> list[str]:
        after = Aftermath(root, self._common, broken=self._broken)
        recovers = self.scene.cleans_first
        with without_waiting_for_the_disk():
            after.newest({NEW} if code == 0 and not recovers else {OLD, NEW})
            after.go_on(
                # After a kill the job starts again; after an error it continues.
                clean_first=recovers or case.mode == KILL,
                # What one recovery could not seal is left to the next one.
                allowed={NEW} if recovers else {OLD, NEW},
            )
        if self.farm.children():
            after.complaints.append("a process still runs")
        return after.complaints

    def _missed(self, case: Case, root: Path, log: Path) -> str:
        """Return a complaint unless exactly the intended call was hit."""
        hit = [normalised(call, root) for call in syscalls.hit(log, case.mode)]
        places = [(call.name, call.count, call.paths) for call in hit]
        if places == [(case.call.name, case.call.count, case.call.paths)]:
            return ""
        return f"not hit; instead: {', '.join(map(str, hit)) or 'nothing'}"

    def _fresh(self) -> Path:
        root = self._scratch / "job"
        shutil.copytree(self._prepared, root, symlinks=True)
        return root

    def _run(self, root: Path, log: Path, inject: str, also: tuple[str, ...] = ()):
        output = self._scratch / "said"
        pid = self.farm.start(self.scene.act, root, output)
        try:
            with syscalls.attached(pid, log, inject, also=also):
                pass
        finally:
            code = self.farm.wait(pid)
        return code, output.read_text()


def normalised(call: Call, root: Path) -> Call:
    """Return the call with paths that are the same in every run."""
    paths = tuple(
        "." + syscalls.normal(path).removeprefix(str(root))
        if (path + "/").startswith(f"{root}/")
        else path
        for path in call.paths
    )
    return replace(call, paths=paths)


def _outcome(mode: str, code: int, printed: str) -> list[str]:
    """Return complaints about how the process ended."""
    if mode == KILL:
        return [] if code == -9 else [f"it ended with {code} instead of being killed"]
    if code == 0:
        return [] if not printed else [f"it printed {printed!r}"]
    lines = printed.splitlines()
    if code != FAILED or len(lines) != 1 or not lines[0].startswith("FAILED: "):
        return [f"it ended with {code} and printed {printed!r}"]
    return []


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


@pytest.fixture(scope="module")
def benches(farm: Farm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    try:
        return {
            scene.name: Bench(tmp_path_factory.mktemp("scene"), farm, scene) for scene in SCENES
        }
    except CannotTrace as error:
        pytest.skip(f"strace may not attach here: {error}")


def check(bench: Bench, cases: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    """Run them all; fail with every one that is bad or did not hit its call."""
    injected: Counter[str] = Counter()
    bad = []
    for case in cases:
        hit, complaints = bench.run(case)
        injected[case.kind] += hit
        if complaints:
            bad.append(f"{case}:\n    " + "\n    ".join(complaints))
    wanted = Counter(case.kind for case in cases)
    with capsys.disabled():
        print(f"\n{bench.scene.name}, {len(bench.calls)} traced calls in {len(MODES)} modes:")
        for kind in wanted:
            print(f"  {kind}: injected {injected[kind]} of {wanted[kind]}")
    assert not bad, f"{bench.scene.name}, {len(bad)} of {len(cases)} cases:\n" + "\n".join(bad)
    assert injected == wanted


def sample(cases: list[Case], size: int) -> list[Case]:
    """Draw a sample with at least one case of each family and mode."""
    shuffled = random.Random(SEED).sample(cases, len(cases))
    first = {case.kind: case for case in reversed(shuffled)}.values()
    rest = [case for case in shuffled if case not in first]
    return sorted([*first, *rest][:size], key=lambda case: case.kind)


@pytest.mark.parametrize(("scene", "size"), [*zip(SCENES, (30, 8, 8), strict=True)], ids=str)
def test_a_sample_of_calls(
    benches: dict[str, Bench], capsys: pytest.CaptureFixture[str], scene: Scene, size: int
) -> None:
    bench = benches[scene.name]
    check(bench, sample(bench.cases(), size), capsys)


@pytest.mark.faults_full
@pytest.mark.timeout(3600)  # each wait in it is bounded
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_every_call(
    benches: dict[str, Bench], capsys: pytest.CaptureFixture[str], scene: Scene, mode: str
) -> None:
    bench = benches[scene.name]
    check(bench, [case for case in bench.cases() if case.mode == mode], capsys)


# -- the check can fail ------------------------------------------------------------------------


def test_missed_call_is_reported(benches: dict[str, Bench]) -> None:
    bench = benches["save"]
    call = replace(bench.calls[0], count=10_000)
    for mode in MODES:
        hit, complaints = bench.run(Case(call, mode))
        assert not hit
        assert any(printed.startswith("not hit") for printed in complaints)


def test_save_that_deletes_the_previous_one_first_is_detected(
    farm: Farm, benches: dict[str, Bench], tmp_path: Path
) -> None:
    bench = Bench(tmp_path, farm, Scene("careless", "careless", nothing))
    publish = next(call for call in reversed(bench.calls) if call.family == "rename")
    for mode in (KILL, EIO):
        hit, complaints = bench.run(Case(publish, mode))
        assert hit
        assert "there is no intact checkpoint" in complaints


def test_traceback_is_detected() -> None:
    assert not _outcome(EIO, FAILED, "FAILED: the disk is broken\n")
    assert _outcome(EIO, 1, "Traceback (most recent call last):\n  ...\nOSError\n")
    assert _outcome(EIO, FAILED, "FAILED: one line\nand another\n")
    assert _outcome(KILL, 0, "")
