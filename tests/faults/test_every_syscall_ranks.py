"""Real ranks, one of which is killed or fails at some system call of a save.

``test_every_syscall`` tries every call of the store with one process; here the calls are drawn,
and every rank must learn about it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from elastic_ckpt.jobdir.paths import checkpoint_key
from tests.faults import syscalls
from tests.faults.aftermath import Aftermath, State, prepare, state_of, without_waiting_for_the_disk
from tests.faults.rank_farm import ENDED, WORLD_SIZE
from tests.faults.store_writer import NEW, NEXT, OLD, PATIENCE, Farm, contents
from tests.faults.syscalls import EIO, ENOSPC, KILL, Call, CannotTrace
from tests.faults.test_every_syscall import normalised
from tests.ports import free_port

SEED = int(os.environ.get("ELASTIC_CKPT_TEST_SEED", "20261123"))
MODES = (KILL, EIO, ENOSPC)
RUNS, FULL_RUNS = 2, 20
BOUND = 30.0
"""Seconds within which every rank must have learned that a peer failed."""

AFTERWARDS = 40
"""Step of the save that the test itself makes once all ranks have ended."""

_NOISE = ("[rank", "[W", "frame #", "Exception raised", "<omitting")


@dataclass(frozen=True)
class Case:
    """What happens to which rank at which of its calls."""

    rank: int
    call: Call
    mode: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.mode} at {self.call}"


@dataclass(frozen=True)
class Rank:
    """How a rank fared: its exit code, None if it had to be killed, and its own words."""

    code: int | None
    outcomes: dict[int, str]
    ended: bool


class Launch:
    """Two ranks, of which one is traced."""

    def __init__(self, farm: Farm, scratch: Path, traced: int, steps: list[int]) -> None:
        self.farm, self.traced = farm, traced
        self.root, self.log = scratch / "job", scratch / "log"
        self.outcomes = [scratch / f"outcomes-{rank}" for rank in range(WORLD_SIZE)]
        self._printed = [scratch / f"said-{rank}" for rank in range(WORLD_SIZE)]
        self._port, self._steps = free_port(), steps
        self.pids: list[int] = []

    def run(self, inject: str, seconds: float, *, alone: bool = False) -> list[Rank]:
        """Return how each rank ended. With ``alone`` the survivor is killed, too."""
        for rank in range(WORLD_SIZE):
            made = self.farm.ask(
                rank=rank, port=self._port, root=str(self.root), printed=str(self._printed[rank]),
                outcomes=str(self.outcomes[rank]), traced=rank == self.traced, steps=self._steps,
            )  # fmt: skip
            self.pids.append(int(made["pid"]))
        found: dict[int, Rank] = {}
        try:
            victim = self.pids[self.traced]
            assert self.farm.ask(stopped=victim)["stopped"], self.printed()
            with syscalls.attached(victim, self.log, inject, threads=False):
                pass
            order_of_ends = sorted(range(WORLD_SIZE), key=lambda rank: rank != self.traced)
            for rank in order_of_ends:
                found[rank] = self._end(rank, seconds)
                if alone:
                    os.kill(self.pids[1 - rank], signal.SIGKILL)
                    alone = False
        finally:
            for rank in set(range(len(self.pids))) - found.keys():
                os.kill(self.pids[rank], signal.SIGKILL)
                self.farm.wait(self.pids[rank])
        return [found[rank] for rank in range(WORLD_SIZE)]

    def printed(self) -> str:
        """Return the ranks' output without torch's own stacks."""
        texts = [path.read_text() for path in self._printed if path.exists()]
        lines = [line for text in texts for line in text.splitlines()]
        return "\n    ".join(line for line in lines if not line.startswith(_NOISE))

    def _end(self, rank: int, seconds: float) -> Rank:
        try:
            code = self.farm.wait(self.pids[rank], seconds)
        except TimeoutError:
            code = None
        path = self.outcomes[rank]
        lines = path.read_text().splitlines() if path.exists() else []
        outcomes = dict(line.split(" ", 1) for line in lines if line != ENDED)
        return Rank(code, {int(step): text for step, text in outcomes.items()}, ENDED in lines)


class Bench:
    """The calls of undisturbed ranks, and runs in which one of them is hit."""

    def __init__(self, farm: Farm, scratch: Path) -> None:
        self.farm, self._scratch = farm, scratch
        tools = scratch / "tools"
        common = prepare(tools)
        self._contents: dict[int, State] = {AFTERWARDS: {**common, **contents(AFTERWARDS)}}
        self.calls: dict[int, list[Call]] = {}
        for rank in range(WORLD_SIZE):
            self._undisturbed(rank)

    def _undisturbed(self, rank: int) -> None:
        launch = Launch(self.farm, self._scratch, rank, [NEW, NEXT])
        ranks = launch.run("", PATIENCE)
        sealed = Rank(0, {NEW: "sealed", NEXT: "sealed"}, ended=True)
        assert ranks == [sealed, sealed], f"{ranks}\n{launch.printed()}"
        for step in (OLD, NEW, NEXT):
            self._contents[step] = state_of(launch.root / f"epoch-0_step-{step}")
        calls = syscalls.parse(launch.log)
        printed = [
            call.name == "write" and str(launch.outcomes[rank]) in call.paths for call in calls
        ]
        of_new = syscalls.inside(calls[: printed.index(True)], launch.root)
        self.calls[rank] = [normalised(call, launch.root) for call in of_new]
        assert self.calls[rank]
        shutil.rmtree(launch.root)

    def draw(self, runs: int) -> list[Case]:
        """Draw calls for cases of every rank and mode in turn."""
        dice = random.Random(SEED)
        kinds = [(rank, mode) for mode in MODES for rank in range(WORLD_SIZE)]
        dice.shuffle(kinds)
        picked = (kinds * runs)[:runs]
        return [Case(rank, dice.choice(self.calls[rank]), mode) for rank, mode in picked]

    def run(self, case: Case) -> list[str]:
        """Return complaints about one run and its aftermath."""
        killed = case.mode == KILL
        steps = [NEW] if killed else [NEW, NEXT]
        launch = Launch(self.farm, self._scratch, case.rank, steps)
        inject = syscalls.injection(case.call, case.mode)
        # A rank that dies silently is noticed by the agent, which then kills the others. A leader
        # takes the store along with it, which the others notice by themselves.
        ranks = launch.run(inject, BOUND, alone=killed and case.rank != 0)
        complaints = [*self._missed(case, launch), *_judge(case, ranks)]
        complaints += self._aftermath(case, launch.root, ranks)
        if complaints and launch.printed():
            complaints.append(launch.printed())
        shutil.rmtree(launch.root)
        return complaints

    def _missed(self, case: Case, launch: Launch) -> list[str]:
        hit = [normalised(call, launch.root) for call in syscalls.hit(launch.log, case.mode)]
        if [(call.name, call.paths) for call in hit] == [(case.call.name, case.call.paths)]:
            return []
        return [f"not hit; instead: {', '.join(map(str, hit)) or 'nothing'}"]

    def _aftermath(self, case: Case, root: Path, ranks: list[Rank]) -> list[str]:
        after = Aftermath(root, {}, contents_of=self._contents_of)
        with without_waiting_for_the_disk():
            sealed = {step for rank in ranks for step in _sealed(rank)}
            after.newest({max(sealed)} if sealed else {OLD, NEW})
            there = {checkpoint_key(path.name) for path in root.iterdir()}
            after.complaints += [
                f"step {step} was reported as sealed and is not there"
                for step in sealed
                if (0, step) not in there
            ]
            after.go_on(clean_first=True, step=AFTERWARDS, allowed={OLD, NEW, NEXT})
        if self.farm.children():
            after.complaints.append("a process still runs")
        return after.complaints

    def _contents_of(self, step: int) -> State:
        return self._contents[step]


def _sealed(rank: Rank) -> list[int]:
    return [step for step, printed in rank.outcomes.items() if printed == "sealed"]


def _judge(case: Case, ranks: list[Rank]) -> list[str]:
    """Return complaints unless every rank learned the same outcome in time."""
    if case.mode == KILL:
        return _judge_killed(case, ranks)
    printed = [rank.outcomes for rank in ranks]
    wrong = [f"{index}: {rank}" for index, rank in enumerate(ranks) if not rank.ended]
    if any(outcomes != printed[0] for outcomes in printed):
        wrong.append(f"the ranks do not agree: {printed}")
    if printed[0].get(NEXT) != "sealed":
        wrong.append(f"the next save of the same ranks: {printed[0].get(NEXT)}")
    return wrong


def _judge_killed(case: Case, ranks: list[Rank]) -> list[str]:
    wrong = []
    if ranks[case.rank].code != -signal.SIGKILL:
        wrong.append(f"rank {case.rank} ended with {ranks[case.rank].code}, not by the kill")
    if case.rank == 0 and ranks[1].code is None:
        wrong.append(f"rank 1 was still there {BOUND:.0f} s after the leader's end")
    return wrong


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    if not syscalls.have_strace():
        pytest.skip("strace is not installed")
    farm = Farm(tmp_path_factory.mktemp("farm"), "tests.faults.rank_farm")
    try:
        yield Bench(farm, tmp_path_factory.mktemp("ranks"))
        assert not farm.children()
    except CannotTrace as error:
        pytest.skip(f"strace may not attach here: {error}")
    finally:
        farm.close()


def check(bench: Bench, cases: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    injected, bad = 0, []
    for case in cases:
        complaints = bench.run(case)
        injected += not any(printed.startswith("not hit") for printed in complaints)
        if complaints:
            bad.append(f"{case}:\n    " + "\n    ".join(complaints))
    with capsys.disabled():
        calls = ", ".join(f"{len(calls)} of rank {rank}" for rank, calls in bench.calls.items())
        print(f"\nseed {SEED}, {WORLD_SIZE} real ranks: ", end="")
        print(f"injected {injected} of {len(cases)} cases; traced calls: {calls}")
    assert not bad, f"{len(bad)} of {len(cases)} cases:\n" + "\n".join(bad)


def test_a_sample_of_calls_of_real_ranks(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    check(bench, bench.draw(RUNS), capsys)


@pytest.mark.faults_full
def test_a_larger_sample_of_calls_of_real_ranks(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    check(bench, bench.draw(FULL_RUNS), capsys)
