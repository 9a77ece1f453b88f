"""The job that the disturbances meet: its file systems, its output's reader, a cheap look at it."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elastic_ckpt.checkpoint.catalog import newest_intact
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.jobdir.node_record import NodeRecord, job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Slot
from tests.job import TINY, Job

SMALL_PIPE = 4096
_SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ, which Python 3.9 does not name


class Place:
    """The file systems of one job: small ones, of which the disk can be taken away.

    ::

        disk/     tmpfs, which stays
        job/      disk/, bound here: what the job is given
        empty/    another directory, bound over it in place of the disk
        memory/   tmpfs for the memory tier
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("disk", "job", "empty", "memory"):
            (root / name).mkdir(parents=True)
        self._mounted: list[Path] = []

    @property
    def job(self) -> Path:
        return self.root / "job"

    @property
    def memory(self) -> Path:
        return self.root / "memory"

    def mount_all(self) -> bool:
        """Return whether that is possible here."""
        if os.geteuid() != 0:
            return False
        return (
            self._mount("-t", "tmpfs", "-o", "size=256m,mode=700", "tmpfs", self.root / "disk")
            and self._mount("-t", "tmpfs", "-o", "size=4m,mode=1777", "tmpfs", self.memory)
            and self._mount("--bind", self.root / "disk", self.job)
        )

    def take_disk_away(self, dice: random.Random) -> None:
        """Unmount it, as for a repair, or mount something else over it."""
        if dice.random() < 0.5:
            self._unmount(self.job)
        else:
            assert self._mount("--bind", self.root / "empty", self.job)

    def bring_disk_back(self) -> None:
        """Mount it again. Nothing may have been written in its place.

        Only an empty directory may have been made, between two calls while the disk went.
        """
        written = [path.name for path in self.job.rglob("*") if not path.is_dir()]
        for path in self.job.iterdir():
            shutil.rmtree(path, ignore_errors=True)  # the job removes what it made, too
        if self._mounted.count(self.job) > 1:
            self._unmount(self.job)
        else:
            assert self._mount("--bind", self.root / "disk", self.job)
        assert written == [], f"written where no disk was mounted: {written}"

    def unmount_all(self) -> None:
        for path in reversed(self._mounted.copy()):
            self._unmount(path)

    def _mount(self, *arguments: object) -> bool:
        command = ["mount", *map(str, arguments)]
        made = subprocess.run(command, capture_output=True).returncode == 0
        if made:
            self._mounted.append(Path(command[-1]))
            subprocess.run(["mount", "--make-private", command[-1]], check=True)
        return made

    def _unmount(self, path: Path) -> None:
        # Lazily: the job has files open there.
        subprocess.run(["umount", "-l", str(path)], check=True)
        self._mounted.reverse()
        self._mounted.remove(path)  # the newest
        self._mounted.reverse()


@contextlib.contextmanager
def place(root: Path) -> Iterator[Place | None]:
    """Mount a job's file systems; yield None where that is not possible."""
    made = Place(root)
    try:
        is_mounted = made.mount_all()
        yield made if is_mounted else None
        if is_mounted:  # what is looked at afterwards
            shutil.copytree(made.job, root / "kept", symlinks=True)
    finally:
        made.unmount_all()


class Pager:
    """Reads a job's output into its log, and can be stopped as with Ctrl-Z."""

    def __init__(self, log: Path) -> None:
        reading, self.fd = os.pipe()
        fcntl.fcntl(self.fd, _SET_PIPE_SIZE, SMALL_PIPE)
        with open(log, "ab") as file:
            self.process = subprocess.Popen(["cat"], stdin=reading, stdout=file)
        os.close(reading)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def leave(self) -> None:
        """Go away: what is written from now on is refused."""
        os.close(self.fd)
        self.process.kill()
        self.process.wait(10)


@dataclass(frozen=True)
class Seen:
    """A rank, or the position of all."""

    pid: int
    phase: str
    step: int


@dataclass(frozen=True)
class Look:
    """What the disturbances need of ``status``, which costs too much to poll."""

    state: str
    incarnation: int
    workers: list[Seen]
    slots: list[Slot]

    @property
    def position(self) -> Seen | None:
        return min(self.workers, key=lambda one: one.step, default=None)


class WildJob(Job):
    """A job that is disturbed.

    Attributes:
        place: its file systems; None where it has none of its own.
        kept: the step from which the next incarnation must resume, or a later one.
        rewound_to: the step from which it must resume exactly.
    """

    def __init__(self, directory: Path, *arguments: str, place: Place | None = None) -> None:
        self.leave = directory / "leave"
        self.chatty = directory / "chatty"
        self.calm = directory / "calm"
        files = ("--leave", str(self.leave), "--chatty", str(self.chatty), "--calm", str(self.calm))
        super().__init__(directory, *arguments, *files, script=TINY)
        self.place = place
        self.kept = 0
        self._set_aside = self._noted_in = 0
        self.rewound_to: int | None = None
        self.gone_back_to: set[str] = set()
        """Attempts that were named to --from, which goes back to each once."""
        self.hosts = 0  # names that its host has had
        self.pager = Pager(self.log)
        self._record: NodeRecord | None = None
        if place is not None:
            self.directory, self.memory = place.job, place.memory
            self.options = ["--memory-dir", str(place.memory)]

    # -- starting and ending --------------------------------------------------------------

    def start(self, *options: str) -> Job:
        self.note_kept()
        self.output_to = self.pager.fd
        return super().start(*options)

    def another_run(self) -> WildJob:
        """Return a second run of the same job, on what seems to be another node."""
        other = copy.copy(self)
        other.log = self.root / "another-log"
        other.process, other._record = None, None
        other.options = [*self.options, "--node-name", "another"]
        Job.start(other)
        return other

    def close(self) -> None:
        super().close()
        self.pager.leave()

    def new_pager(self) -> None:
        """Have the output of the next run read by another process."""
        self.pager.leave()
        self.pager = Pager(self.log)

    # -- what must not be lost ------------------------------------------------------------

    def newest_sealed(self) -> int:
        """Return the step of the newest checkpoint on disk or in memory; 0 if there is none."""
        steps = []
        with contextlib.suppress(FileNotFoundError):  # before the first start
            disk = newest_intact(JobDirectory(self.directory.resolve()))
            steps += [disk.step] if disk is not None else []
        steps += [one.seal.step for tier in self.tiers() for one in MemoryTier(tier).sealed()]
        return max(steps, default=0)

    def set_aside(self) -> int:
        """Count what is in quarantine; nothing while the disk is away."""
        return len(list((self.directory / ".quarantine").glob("epoch-*")))

    def note_kept(self) -> None:
        """Remember what the next incarnation must not lose."""
        self.kept = self.newest_sealed()
        self._set_aside = self.set_aside()
        self._noted_in = 0
        with contextlib.suppress(OSError):
            self._noted_in = self.view().incarnation if self.process else 0

    def until_training(self) -> Look:
        look: Look = super().until_training()
        resumed = {slot.start_step for slot in look.slots}
        if self.rewound_to is not None:
            assert resumed == {self.rewound_to}, (resumed, self.rewound_to, self.output())
            self.rewound_to = None
        # A step that fails twice, if for two reasons, sets the checkpoint before it aside.
        if self.set_aside() == self._set_aside and look.incarnation != self._noted_in:
            assert min(resumed) >= self.kept, (resumed, self.kept, self.output())
        self.kept = 0
        return look

    # -- looking --------------------------------------------------------------------------

    def record(self) -> NodeRecord:
        """Return the supervisor's record, the last one seen while the disk is away."""
        assert self.process is not None
        for record in job_records(JobDirectory(self.directory.resolve())):
            if record.owner.pid == self.process.pid:
                self._record = record
        if self._record is None or self._record.owner.pid != self.process.pid:
            raise OSError("no record yet")
        return self._record

    def view(self) -> Look:
        """Look at the board alone, which costs little."""
        record = self.record()
        try:
            board = Board.open(record.board, writable=False)
        except OSError:  # the run has ended
            return Look(record.state.value, record.incarnation, [], [])
        slots = [slot for slot in board.read_slots() if slot.pid]
        workers = [Seen(one.pid, one.phase.name.lower(), one.shown_step) for one in slots]
        return Look(record.state.value, max(record.incarnation, board.incarnation), workers, slots)

    def step(self) -> int:
        """Return the step that all ranks have finished."""
        position = self.until_training().position
        assert position is not None
        return position.step
