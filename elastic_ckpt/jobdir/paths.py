"""The paths in a job directory; ``docs/format.md`` lists them."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elastic_ckpt.errors import DirectoryUnusable, UsageError
from elastic_ckpt.util.files import (
    TEMPORARY,
    group_may_read,
    let_group_in,
    read_bounded,
    sync_directory,
    write_shared,
)

_NAME = re.compile(r"epoch-([0-9]{1,18})_step-([0-9]{1,18})")
_INNER = frozenset(
    ("sessions", ".attempts", ".quarantine", ".superseded", ".trash", ".elastic-ckpt")
)
_SESSION = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def checkpoint_key(name: str) -> tuple[int, int] | None:
    """Return (epoch, step) of a checkpoint's directory name; None for any other name."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def is_session_name(name: str) -> bool:
    """Return whether a session may have this name: it is a directory's name on any system."""
    return _SESSION.fullmatch(name) is not None


@dataclass(frozen=True)
class JobDirectory:
    """The paths of one job, or of one named session in it.

    Attributes:
        root: where the checkpoints are.
        name: of the session; empty for the job itself and its unnamed session.
    """

    root: Path
    name: str = ""

    @classmethod
    def at(cls, directory: str | os.PathLike[str]) -> JobDirectory:
        """Return the job directory, or session, at a path, made absolute and free of links.

        Raises:
            DirectoryUnusable: the path's links form a loop, or its name is not UTF-8.
        """
        try:
            job = cls.holding(Path(directory).resolve())
        except (OSError, RuntimeError):  # RuntimeError before Python 3.13
            raise DirectoryUnusable(
                f"cannot use {directory}: its links form a loop; choose another directory"
            ) from None
        job.check_name()
        return job

    @classmethod
    def holding(cls, root: Path) -> JobDirectory:
        """Return the job or session whose checkpoints, or superseded ones, are in ``root``."""
        root = root.parent if root.name == ".superseded" else root
        named = root.parent.name == "sessions" and is_session_name(root.name)
        if named and not (root / ".elastic-ckpt").exists():
            named = (root.parent.parent / ".elastic-ckpt").is_dir()
            return cls(root, root.name if named else "")
        return cls(root)

    def refuse_inner(self) -> None:
        """Raise UsageError if this is a directory inside another job's: of a session, or hidden."""
        for home in () if self.control.is_dir() and not self.name else self.root.parents:
            inside = self.root.relative_to(home).parts[0]
            if inside in _INNER and (home / ".elastic-ckpt").is_dir():
                raise UsageError(
                    f"{self.root} belongs to the job in {home}: pass --dir {shlex.quote(str(home))}"
                )

    @property
    def home(self) -> Path:
        """The directory of the whole job."""
        return self.root.parent.parent if self.name else self.root

    def session(self, name: str) -> JobDirectory:
        """Return the paths of a session of this job; those of the unnamed one for ``""``."""
        return JobDirectory(self.home / "sessions" / name if name else self.home, name)

    def shown(self, checkpoint: Path) -> str:
        """Return a checkpoint's name for people, with that of its session."""
        return f"{self.name}/{checkpoint.name}" if self.name else checkpoint.name

    def sessions(self) -> list[JobDirectory]:
        """Return the job, which is its unnamed session, and its named ones; a session alone."""
        places = [] if self.name else sorted(self.found(self.root / "sessions", "*"))
        named = (self.session(one.name) for one in places if is_session_name(one.name))
        return [self, *(one for one in named if self.owns(one.root))]

    @property
    def attempts(self) -> Path:
        """Attempts that are being written; a restart never loads from here."""
        return self.root / ".attempts"

    @property
    def quarantine(self) -> Path:
        """Checkpoints that failed verification, with the reasons; never chosen."""
        return self.root / ".quarantine"

    @property
    def trash(self) -> Path:
        """Checkpoints that retention is deleting; never read."""
        return self.root / ".trash"

    @property
    def verified(self) -> Path:
        """One file for each checkpoint that was verified in full."""
        own = self.control / "sessions" / self.name if self.name else self.control
        return own / "verified"

    @property
    def control(self) -> Path:
        """The control directory, with all other files of ours."""
        return self.home / ".elastic-ckpt"

    @property
    def lock(self) -> Path:
        """Held by the supervisor of group rank 0."""
        return self.control / "lock"

    @property
    def requests(self) -> Path:
        """Requests from ``elastic-ckpt save``, one file each."""
        return self.control / "requests"

    @property
    def runs(self) -> Path:
        """The records of the runs that have owned the job, by number."""
        return self.control / "runs"

    @property
    def superseded(self) -> Path:
        """Checkpoints that the job has gone back behind: never chosen, but kept."""
        return self.root / ".superseded"

    @property
    def own_seals(self) -> Path:
        """The seals of the checkpoints that the script writes itself, by number."""
        return self.control / "own"

    @property
    def own_copies(self) -> Path:
        """Copies of those that the script overwrites in place, by the seal's number."""
        return self.home / "own"

    @property
    def nodes(self) -> Path:
        """The records of the nodes' supervisors."""
        return self.control / "nodes"

    @property
    def left_out(self) -> Path:
        """The nodes that the job leaves out, one file each."""
        return self.control / "left-out"

    @property
    def logs(self) -> Path:
        """The workers' output."""
        return self.control / "logs"

    @property
    def prediction(self) -> Path:
        """What earlier runs learned about the duration of saves."""
        return self.control / "prediction.json"

    def known_identity(self) -> str:
        """Return what tells this job from an earlier one in the same directory.

        Raises:
            OSError: it is missing (FileNotFoundError), or cannot be read.
        """
        return read_bounded(self.control / "identity", 64).decode("ascii", "replace").strip()

    def identity(self) -> str:
        """Return :meth:`known_identity`, created if missing, for a node of the job: all that start
        at once get the same."""
        try:
            return self.known_identity()
        except FileNotFoundError:
            with suppress(FileExistsError):
                write_shared(self.control / "identity", secrets.token_hex(16).encode())
            return self.known_identity()

    def node_lock(self, node: str) -> Path:
        """Held by the supervisor of a node."""
        return self.control / "locks" / node

    def node_record(self, node: str) -> Path:
        """The record of a node's supervisor."""
        return self.nodes / f"{node}.json"

    def node_check(self, node: str) -> Path:
        """What a node writes and reads back before it takes part."""
        return self.nodes / f"{node}.check"

    def heartbeat(self, node: str) -> Path:
        """A node's newest position."""
        return self.nodes / f"{node}.beat"

    def journal(self, node: str) -> Path:
        """A node's journal."""
        return self.control / "journal" / f"{node}.jsonl"

    def checkpoint(self, epoch: int, step: int) -> Path:
        """A checkpoint's directory."""
        return self.root / f"epoch-{epoch}_step-{step}"

    def owns(self, directory: Path) -> bool:
        """Whether a directory of ours exists, and is not reached through a link.

        Below a link, files elsewhere would be read, written or deleted.
        """
        try:
            for place in (directory, *directory.parents):
                if place == self.home:
                    return True
                if not stat.S_ISDIR(os.lstat(place).st_mode):
                    return False
        except OSError:
            pass
        return False

    def require(self, directory: Path) -> None:
        """Create a directory of ours if it is missing, in a job directory that is there.

        Raises:
            DirectoryUnusable: its name is taken by a link or a file.
            FileNotFoundError: the job directory was deleted, or its disk unmounted.
            OSError: the disk refuses.
        """
        inside = directory.relative_to(self.home)
        os.lstat(self.control)  # only ``prepare`` makes a job directory
        for place in (*(self.home / one for one in reversed(inside.parents)), self.home / inside):
            if place == self.home or self.owns(place):
                continue
            if not os.path.lexists(place):
                _make(place)
                if group_may_read(self.control) and not group_may_read(place):
                    let_group_in(place)
            if not self.owns(place):
                raise _is_link(place)

    def found(self, directory: Path, pattern: str) -> Iterator[Path]:
        """Yield what matches in a directory of ours, but for what is being written; nothing if it
        is missing or a link."""
        if self.owns(directory):
            every = directory.glob(pattern)
            yield from (path for path in every if not path.name.startswith(TEMPORARY))

    def prepare(self, *, group_access: bool = False) -> None:
        """Create what is missing, for this user only.

        Args:
            group_access: let the group read the directory, now and later.

        Raises:
            DirectoryUnusable: it cannot be created or written; the message says which.
        """
        own = [
            self.attempts, self.quarantine, self.trash, self.control, self.requests,
            self.verified, self.control / "locks", self.nodes, self.runs,
            self.control / "journal",
        ]  # fmt: skip
        if self.name:
            JobDirectory(self.home).prepare(group_access=group_access)
            for place in (self.attempts, self.quarantine, self.trash, self.verified):
                self.require(place)
            return
        self.check_name()
        for place in [self.root, *own]:
            if place != self.root and place.is_symlink():
                raise _is_link(place)  # before anything below it changes
            try:
                _make(place)
                if group_access and not group_may_read(place):
                    let_group_in(place)
            except OSError as error:
                raise _unusable(place, error) from None
            if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
                raise DirectoryUnusable(
                    f"no permission to write in {place}: run as its owner or choose another --dir"
                )

    def check_name(self) -> None:
        """Raise DirectoryUnusable if JSON cannot hold the path, as manifests and records must."""
        try:
            str(self.root).encode()
        except UnicodeEncodeError:
            shown = os.fsencode(self.root).decode(errors="replace")
            raise DirectoryUnusable(
                f"cannot use {shown}: its name is not UTF-8; choose another directory"
            ) from None

    def check_readable(self) -> None:
        """Raise DirectoryUnusable unless the directory can be listed."""
        try:
            os.scandir(self.root).close()
        except PermissionError:
            raise DirectoryUnusable(
                f"no permission to read {self.root}: log in as its owner, or have the job started "
                "with --group-access and join its group"
            ) from None
        except OSError as error:
            raise _unusable(self.root, error) from None


def _make(place: Path) -> None:
    """Create a directory for its owner only, with its parents; leave an existing one as it is."""
    if place.is_dir():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mkdir(place, 0o700)
    except FileExistsError:
        if not place.is_dir():
            raise  # otherwise another process was faster
    sync_directory(place.parent)


def _is_link(place: Path) -> DirectoryUnusable:
    # A deletion below it would delete files elsewhere.
    return DirectoryUnusable(
        f"{place} is a link or not a directory: remove it, or choose another --dir"
    )


def _unusable(place: Path, error: OSError) -> DirectoryUnusable:
    why = "it is not a directory" if isinstance(error, FileExistsError) else error.strerror
    return DirectoryUnusable(f"cannot use {place}: {why}; choose another directory")
