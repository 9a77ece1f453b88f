"""Run numbers: who owns a job, and may seal. ``docs/design.md`` has the protocol.

::

    .elastic-ckpt/runs/000007.json     the owner; created exclusively, and so the fence
    .elastic-ckpt/runs/000007.beat     rewritten every few seconds while the run lives
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import threading
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.ownership.mount import mount_of
from elastic_ckpt.errors import ElasticCkptError, RunSuperseded
from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.lease import BEAT_SECONDS
from elastic_ckpt.util.directory_stamp import Stamp, stamp_of
from elastic_ckpt.util.files import create_file, read_bounded, sync_directory, write_atomic
from elastic_ckpt.util.text import printable

KEPT_RECORDS: Final = 20
"""Records of earlier runs that stay, for people."""

_MAX_BYTES: Final = 64 * 1024
_LENGTHS: Final = 64
_RECORD = re.compile(r"([0-9]{6,12})\.json")


class RunOwner(msgspec.Struct, frozen=True, kw_only=True):
    """A run that owns, or owned, the job.

    Attributes:
        nonce: tells this record from one of the same number in another directory.
        lock: device and inode of the lock file that it holds; zeros if it holds none.
        endpoint: HOST:PORT where the nodes meet; empty for a job of one node.
        ended: it has ended, and seals nothing any more.
        passed_on: it has ended and left the job to its other nodes.
        continued_from: attempts that ``--from`` has named in this run and those before it.
        rewound: as in :class:`Fence`.
    """

    run_id: str
    node: str
    owner: ProcessIdentity
    nonce: str
    lock: tuple[int, int] = (0, 0)
    endpoint: str = ""
    ended: bool = False
    passed_on: bool = False
    continued_from: tuple[str, ...] = ()
    rewound: int = 0

    @property
    def shown(self) -> str:
        """It, for people."""
        where = f"pid {self.owner.pid} on {printable(self.owner.host)}"
        return f"{where} (run {printable(self.run_id)})"


class Fence:
    """A run's claim to a job. Every process of the run checks it before it seals."""

    def __init__(
        self,
        job: JobDirectory,
        number: int = 0,
        nonce: str = "",
        *,
        rewound: int = 0,
        mount: int = 0,
        identity: str = "",
    ) -> None:
        """Number 0 stands for a process that owns no job; it checks nothing.

        Args:
            rewound: number of the run that took the job back to an older checkpoint last: what
                earlier runs left in memory or unsealed is not continued from.
            mount: where the directory was when the run began, as ``mount_of`` gives it; 0 for not
                known.
            identity: of the job, by which its directory is known where it is mounted again.
        """
        self.job = job
        self.number = number
        self.nonce = nonce
        self.rewound = rewound
        self.mount = mount
        self.identity = identity

    def check(self) -> None:
        """Raise unless this run still owns the job.

        Raises:
            RunSuperseded: another run has taken the job over.
            OSError: the storage does not answer, or as :meth:`check_place`.
        """
        if not self.number:
            return
        newest, found = self._newest()
        is_other = found is not None and found.nonce != self.nonce
        if newest != self.number or is_other:
            self.check_place()
        if newest > self.number or (newest == self.number and is_other):
            by = found.shown if found else f"run number {newest}"
            raise RunSuperseded(
                f"{by} has taken over {self.job.root}: this run stops and seals nothing; "
                f"elastic-ckpt status {self.job.root} shows the job"
            )

    def check_place(self) -> None:
        """Raise if another directory is in the place of the job's: nothing may be written there.

        A new one where it was deleted is still the job's, unless it is on another mount.

        Raises:
            OSError: a disk was unmounted, or another one mounted over it.
        """
        if not self.number or not self.mount or mount_of(self.job.home) == self.mount:
            return
        with contextlib.suppress(FileNotFoundError):
            if self.job.known_identity() == self.identity:
                return  # it was mounted again
        why = "its disk is not mounted, another directory is in its place"
        raise OSError(errno.ESTALE, why, str(self.job.home))

    def _newest(self) -> tuple[int, RunOwner | None]:
        newest = newest_number(self.job)
        return newest, read_run(self.job, newest)


class Ownership(Fence):
    """The claim of the process that made it: it beats, and ends it.

    Attributes:
        shows_changes: whether the directory of the records has shown another stamp once a record
            was created. Not so on a file system without times of directories.
    """

    def __init__(self, job: JobDirectory, number: int, record: RunOwner) -> None:
        super().__init__(
            job, number, record.nonce, rewound=record.rewound, mount=mount_of(job.home),
            identity=job.identity(),
        )  # fmt: skip
        self.record = record
        self.shows_changes = False
        self._beats = 0
        self._written = 0  # bytes of the newest beat that was written in full

    @classmethod
    def claim(cls, job: JobDirectory, number: int, record: RunOwner) -> Ownership:
        """Create the record of a number.

        Raises:
            FileExistsError: another run was faster.
            OSError: the storage failed.
        """
        before = _stamp(job)
        _create(job, number, record)
        made = cls(job, number, record)
        made.beat()
        made.shows_changes = before is not None and _stamp(job) != before
        _forget(job, number - KEPT_RECORDS)
        return made

    def beat(self) -> None:
        """Show the other hosts that this run lives.

        Raises:
            OSError: the storage does not answer.
        """
        self._beats += 1
        path = _path(self.job, self.number, "beat")
        if self._written:
            # Another length is another beat. One call, which a file server sees at once.
            with contextlib.suppress(OSError):
                os.truncate(path, self._written + self._beats % _LENGTHS)
                return
        # No fsync: after a power cut no run beats any more.
        data = f"{self.nonce} {self._beats}\n".encode()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        self._written = len(data)

    def beat_and_check(self) -> None:
        """Beat, and raise as :meth:`check`; a record that was removed is written again."""
        if not os.path.lexists(_path(self.job, self.number)):
            self.check_place()
            self.job.prepare()  # the directory may have been deleted
            with contextlib.suppress(FileExistsError):
                _create(self.job, self.number, self.record)
        self.check()
        self.beat()

    def rewind(self, attempt: str = "") -> None:
        """Record that the job has been taken back to a checkpoint: by ``--from``, of ``attempt``.

        Raises:
            OSError: the storage does not answer.
        """
        done = (*self.record.continued_from, *([attempt] if attempt else []))
        self.rewound = self.number
        self.record = msgspec.structs.replace(self.record, continued_from=done, rewound=self.number)
        write_atomic(_path(self.job, self.number), msgspec.json.encode(self.record))

    def end(self, *, passed_on: bool = False) -> None:
        """Record that this run has ended, so that the next one need not wait for its lease."""
        with contextlib.suppress(OSError, RunSuperseded):
            self.check()
            ended = msgspec.structs.replace(self.record, ended=True, passed_on=passed_on)
            write_atomic(_path(self.job, self.number), msgspec.json.encode(ended))

    def beat_in_background(self) -> None:
        """Beat from a thread until this process ends; for a script without a supervisor."""

        def work() -> None:
            pause = threading.Event()
            while not pause.wait(BEAT_SECONDS):
                with contextlib.suppress(OSError, ElasticCkptError):  # a save finds out as well
                    self.beat_and_check()

        threading.Thread(target=work, name="beat", daemon=True).start()


def new_record(
    job: JobDirectory, node: str, run_id: str, endpoint: str, previous: RunOwner | None
) -> RunOwner:
    """Return the record of this process, which takes the job over from ``previous``."""
    lock = (0, 0)
    with contextlib.suppress(OSError):
        found = os.stat(job.lock)
        lock = (found.st_dev, found.st_ino)
    return RunOwner(
        run_id=run_id, node=node, owner=ProcessIdentity.current(), nonce=secrets.token_hex(16),
        lock=lock, endpoint=endpoint,
        continued_from=previous.continued_from if previous else (),
        rewound=previous.rewound if previous else 0,
    )  # fmt: skip


def count_from(job: JobDirectory, number: int) -> None:
    """Let the next run of a directory have a higher number than ``number``, of a run elsewhere
    whose checkpoint it has now. For the holder of the job's lock; raises as the newest."""
    if newest_number(job) < number:
        record = RunOwner(
            run_id="elsewhere", node="", owner=ProcessIdentity.current(), nonce="", ended=True
        )
        _create(job, number, record)


def newest_number(job: JobDirectory) -> int:
    """Return the number of the newest run; 0 without any.

    Raises:
        OSError: the storage does not answer.
    """
    return max(run_numbers(job), default=0)


def run_numbers(job: JobDirectory) -> list[int]:
    """Return the numbers of the runs that have records, in no order; raises as the newest."""
    try:
        names = os.listdir(job.runs)
    except FileNotFoundError:
        return []
    return [int(match[1]) for name in names if (match := _RECORD.fullmatch(name))]


def read_run(job: JobDirectory, number: int) -> RunOwner | None:
    """Return the record of a run; None if it is missing or torn."""
    try:
        return msgspec.json.decode(read_bounded(_path(job, number), _MAX_BYTES), type=RunOwner)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def read_beat(job: JobDirectory, number: int) -> bytes:
    """Return a run's newest beat; empty if there is none."""
    try:
        return read_bounded(_path(job, number, "beat"), 4096)
    except (OSError, ValueError):
        return b""


def _stamp(job: JobDirectory) -> Stamp | None:
    with contextlib.suppress(OSError):
        return stamp_of(job.runs)
    return None


def _path(job: JobDirectory, number: int, kind: str = "json") -> Path:
    return job.runs / f"{number:06d}.{kind}"


def _create(job: JobDirectory, number: int, record: RunOwner) -> None:
    job.require(job.runs)
    path = _path(job, number)
    fd = create_file(path)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    sync_directory(job.runs)


def _forget(job: JobDirectory, last: int) -> None:
    for path in job.found(job.runs, "*"):
        number = path.name.split(".")[0]
        if number.isdigit() and int(number) <= last:
            with contextlib.suppress(OSError):
                path.unlink()
