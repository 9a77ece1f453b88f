"""Power cuts of real file systems: a guest's kernel records each write, the host replays a part."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from tests import uml

_TOOLS = ("mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "losetup")


class Case(msgspec.Struct, frozen=True):
    """A job that is recorded: on which file system, and how many states are looked at.

    ``fsync`` is what the job's fsync works on: ``on`` for all, ``off``, or ``directories``. The
    job saves at so many ``steps``.
    """

    kind: str
    options: str
    fsync: str
    states: int
    steps: int = 12

    @classmethod
    def of(cls, words: Sequence[str]) -> Case:
        kind, options, fsync, states, steps = words
        return cls(kind, options, fsync, int(states), int(steps))

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.options}), fsync {self.fsync}"


class Outcome(msgspec.Struct):
    """What the states of one case showed.

    Attributes:
        entries, flushes: of the log.
        bad: the states in which something was lost, each with its complaints.
        reported: by the newest step that had been reported sealed: number of states.
    """

    name: str
    states: int
    entries: int
    flushes: int
    bad: list[str] = []
    reported: dict[str, int] = {}

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.states} states, {len(self.bad)} of them bad; "
            f"{self.entries} entries, {self.flushes} flushes"
        )


def why_not() -> str:
    """Return why no power can be cut here; empty if it can."""
    if why := uml.why_not():
        return why
    for tool in _TOOLS:
        if not shutil.which(tool):
            return f"{tool} is not installed (apt-get install xfsprogs btrfs-progs)"
    if not os.path.exists("/dev/loop-control"):
        return "there are no loop devices"
    missing = {"ext4", "xfs", "btrfs"} - set(Path("/proc/filesystems").read_text().split())
    return f"this kernel has no {', '.join(sorted(missing))}" if missing else ""


def outcomes(directory: Path, cases: Iterable[Case], seed: int, seconds: float) -> list[Outcome]:
    """Record and look at all cases; AssertionError if that fails, or takes too long.

    All of it happens in memory that is mounted on ``directory``, where no other process sees it.
    Processes, mounts, loop devices and files in memory end with it, even if it is killed.
    """
    words = [str(one) for case in cases for one in msgspec.structs.astuple(case)]
    command = [
        "setpriv", "--pdeathsig=KILL",
        "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc",
        "--kill-child=KILL",
        sys.executable, "-m", "tests.power_cuts", str(directory), str(seed), *words,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, cwd=uml.REPOSITORY, timeout=seconds,
            env={**os.environ, "PYTHONPATH": str(uml.REPOSITORY)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the power cuts took over {seconds:.0f} s") from None
    assert done.returncode == 0, f"exit code {done.returncode}: see above"
    return [msgspec.json.decode(line, type=Outcome) for line in done.stdout.splitlines()]
