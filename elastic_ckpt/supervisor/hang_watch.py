"""Looks for a hang, and finds out who is to blame before anybody is killed."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.hang import Hang, HangDetector, Silence, StalledNode
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome, Slot
from elastic_ckpt.util.text import printable

AWAY_SECONDS: Final = 5.0
"""Between two looks, of which there are four a second: this process was stopped meanwhile, and so
were the workers, as SLURM suspends a job or a shell does on Ctrl-Z."""


class HangWatch:
    """One node's; the supervisor's loop calls :meth:`look` at each of its turns.

    Attributes:
        idle: whether all of this node's ranks are silent for longer than they ever are.
    """

    def __init__(
        self,
        board: Board,
        journal: Journal,
        least_seconds: float,
        wake: Callable[[], None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """
        Args:
            wake: called from a thread when the stacks are there.
            clock: monotonic nanoseconds.
        """
        self._board = board
        self._journal = journal
        self._wake = wake
        self._clock = clock
        self._looked = self._back = clock()  # at the last look, and when it was away last
        self._detector = HangDetector(least_seconds)
        self._before: dict[
            int, tuple[int, Silence]
        ] = {}  # by local rank: its beat, and where it was
        self._looking = False
        self._found: StalledNode | None = None
        self.idle = False
        self._incarnations = 0  # a thread that is late must not speak of a later one

    def begin(self) -> None:
        """Another incarnation begins: nobody is idle yet."""
        self._before.clear()
        self._looked = self._clock()
        self._incarnations += 1
        self._looking, self._found, self.idle = False, None, False

    def look(self, *, alone: bool = True) -> StalledNode | None:
        """A hang, once its stacks are there; None while there is none. Does not wait.

        Args:
            alone: no rank of another node has to be idle, too.
        """
        now = self._clock()
        if now - self._looked > AWAY_SECONDS * 1e9:
            self._back = now
        self._looked = now
        if self._looking:
            found, self._found = self._found, None
            return found
        slots = [slot for slot in self._board.read_slots() if slot.outcome is Outcome.NONE]
        silences = [_silence(slot, now, self._back) for slot in slots]
        for slot, silence in zip(slots, silences, strict=True):
            beat, before = self._before.get(slot.local_rank, (slot.beat, silence))
            if beat != slot.beat:
                # At most a look too long; what was seen at the last look may be half of it.
                idle = max((slot.beat - max(beat, self._back)) / 1e9, before.idle_seconds)
                self._detector.learn(replace(before, idle_seconds=idle))
            self._before[slot.local_rank] = slot.beat, silence
        self.idle = self._detector.hangs(silences)
        if self.idle and alone:
            self._looking = True
            threading.Thread(
                target=self._explain,
                args=(slots, silences, self._incarnations),
                name="hang",
                daemon=True,
            ).start()
        return None

    def _explain(
        self, slots: Sequence[Slot], silences: Sequence[Silence], incarnation: int
    ) -> None:
        stacks = dump_stacks({slot.rank: slot.pid for slot in slots})
        stuck = StalledNode(
            tuple(silences),
            tuple(number for number, stack in stacks.items() if stack.waits),
            {number: stack.own for number, stack in stacks.items() if stack.own},
        )
        self._journal.write(
            "hang",
            rank=Hang.of([stuck]).rank,
            step=max(silence.entered for silence in silences),
            idle_seconds=min(silence.idle_seconds for silence in silences),
            phases={str(silence.rank): silence.phase for silence in silences},
            stacks={str(number): list(stack.frames) for number, stack in stacks.items()},
        )
        if incarnation == self._incarnations:
            self._found = stuck
            self._wake()


def _silence(slot: Slot, now: int, back: int) -> Silence:
    return Silence(
        rank=slot.rank,
        phase=slot.phase.name.lower(),
        entered=slot.entered,
        idle_seconds=(now - max(slot.beat, back)) / 1e9 if slot.beat else 0.0,
        # Where an evaluation cannot be told from a step, nothing is learnt of either.
        has_stepped=slot.declares and slot.finished > slot.start_step,
    )


DUMP_SECONDS: Final = 10.0
_MAX_FRAMES: Final = 40
_COLLECTIVE: Final = "torch/distributed/"
_CALLERS: Final = ("<frozen runpy>", "/runpy.py")
"""What runs the script: the second is Python 3.10's."""

_BACKWARD: Final = "_engine_run_backward"
"""DistributedDataParallel waits for the other ranks inside of it."""


@dataclass(frozen=True)
class Stack:
    """The main thread of a worker, innermost first; or why nobody could look."""

    frames: tuple[str, ...]

    @property
    def waits(self) -> bool:
        """Whether it is inside of a collective, as far as Python's frames tell."""
        return any(_COLLECTIVE in frame or _BACKWARD in frame for frame in self.frames)

    @property
    def own(self) -> str:
        """The innermost frame that is no library's; empty if there is none."""
        return next((one for one in self.frames if "site-packages" not in one), "")


def dump_stacks(pids: Mapping[int, int]) -> dict[int, Stack]:
    """Stacks by rank; bounded, also where a process does not stop for it."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = {rank: pool.submit(_dump, pid) for rank, pid in pids.items()}
        return {rank: future.result() for rank, future in found.items()}


def _dump(pid: int) -> Stack:
    command = [_program(), "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DUMP_SECONDS,
            check=False,
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            return Stack((f"no stack: {printable(said[-1] if said else 'py-spy failed', 300)}",))
        threads = json.loads(done.stdout)
        main = next(one for one in threads if one.get("thread_name") == "MainThread")
        return Stack(tuple(_script_frames(main["frames"]))[:_MAX_FRAMES])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, StopIteration) as error:
        return Stack((f"no stack: {printable(str(error), 300) or type(error).__name__}",))


def _script_frames(frames: list[dict[str, Any]]) -> Iterator[str]:
    """The script's own, and what it called; not what called the script."""
    for frame in frames:
        if frame["filename"].endswith(_CALLERS):
            return
        yield printable(f"{frame['name']} ({frame['filename']}:{frame['line']})", 300)


def _program() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "py-spy"
    return str(beside) if beside.exists() else "py-spy"
