"""Where things are in a job directory. See ``docs/design.md`` for the picture."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elastic_ckpt.errors import DirectoryUnusable
from elastic_ckpt.util.files import (
    group_may_read,
    let_group_in,
    read_bounded,
    sync_directory,
    write_atomic,
)

_NAME = re.compile(r"epoch-([0-9]{1,18})_step-([0-9]{1,18})")


def checkpoint_key(name: str) -> tuple[int, int] | None:
    """(epoch, step) of a checkpoint's directory name, None for any other name."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class JobDirectory:
    """The paths of one job."""

    root: Path

    @classmethod
    def at(cls, directory: str | os.PathLike[str]) -> JobDirectory:
        """The job directory at a path, which is made absolute and free of links.

        Raises:
            DirectoryUnusable: the path is a link that leads in a circle, or is no text.
        """
        try:
            job = cls(Path(directory).resolve())
        except (OSError, RuntimeError):  # RuntimeError before Python 3.13
            raise DirectoryUnusable(
                f"cannot use {directory}: its links lead in a circle; choose another directory"
            ) from None
        job.check_name()
        return job

    @property
    def attempts(self) -> Path:
        """Attempts being written; a restart never loads from here."""
        return self.root / ".attempts"

    @property
    def quarantine(self) -> Path:
        """What failed verification, kept with its reason, never chosen."""
        return self.root / ".quarantine"

    @property
    def trash(self) -> Path:
        """What retention let go, on its way out; never read."""
        return self.root / ".trash"

    @property
    def verified(self) -> Path:
        """One file for each checkpoint that was once verified in full."""
        return self.control / "verified"

    @property
    def control(self) -> Path:
        """Our own files."""
        return self.root / ".elastic-ckpt"

    @property
    def lock(self) -> Path:
        """Held by the supervisor of group rank 0."""
        return self.control / "lock"

    @property
    def requests(self) -> Path:
        """Requests from ``elastic-ckpt save``, one file each."""
        return self.control / "requests"

    @property
    def nodes(self) -> Path:
        """What each node's supervisor last said of itself."""
        return self.control / "nodes"

    @property
    def logs(self) -> Path:
        """What the workers printed."""
        return self.control / "logs"

    @property
    def prediction(self) -> Path:
        """What was learned of how long saves take."""
        return self.control / "prediction.json"

    def known_identity(self) -> str:
        """What tells this job from another one that had the same directory before.

        Raises:
            OSError: there is none (FileNotFoundError), or it cannot be read.
        """
        return read_bounded(self.control / "identity", 64).decode("ascii", "replace").strip()

    def identity(self) -> str:
        """:meth:`known_identity`; made if there is none. Only the holder of the job's lock."""
        try:
            return self.known_identity()
        except FileNotFoundError:
            write_atomic(self.control / "identity", secrets.token_hex(16).encode())
            return self.known_identity()

    def node_lock(self, node: str) -> Path:
        """Held by the supervisor of a node."""
        return self.control / "locks" / node

    def node_record(self, node: str) -> Path:
        """What a node's supervisor last said of itself."""
        return self.nodes / f"{node}.json"

    def heartbeat(self, node: str) -> Path:
        """Where a node's job was a few seconds ago."""
        return self.nodes / f"{node}.beat"

    def journal(self, node: str) -> Path:
        """A node's events."""
        return self.control / "journal" / f"{node}.jsonl"

    def checkpoint(self, epoch: int, step: int) -> Path:
        """A checkpoint's place."""
        return self.root / f"epoch-{epoch}_step-{step}"

    def owns(self, directory: Path) -> bool:
        """Whether a directory of ours is there, and no link leads to it.

        What is read, written or deleted below a link would be that of another place.
        """
        try:
            for place in (directory, *directory.parents):
                if place == self.root:
                    return True
                if not stat.S_ISDIR(os.lstat(place).st_mode):
                    return False
        except OSError:
            pass
        return False

    def require(self, directory: Path) -> None:
        """Make a directory of ours if it is missing.

        Raises:
            DirectoryUnusable: a link or something else is in its place.
            OSError: the disk says no.
        """
        for place in (directory.parent, directory):
            if place != self.root and not os.path.lexists(place):
                _make(place)
                if group_may_read(self.control) and not group_may_read(place):
                    let_group_in(place)
            if not self.owns(place):
                raise _is_link(place)

    def found(self, directory: Path, pattern: str) -> Iterator[Path]:
        """What matches in a directory of ours; nothing if it is missing or a link."""
        if self.owns(directory):
            yield from directory.glob(pattern)

    def prepare(self, *, group_access: bool = False) -> None:
        """Create what is missing, for this user alone.

        Args:
            group_access: let the group read what is and will be in it.

        Raises:
            DirectoryUnusable: it cannot be created or written; the message says which.
        """
        own = [
            self.attempts, self.quarantine, self.trash, self.control, self.requests,
            self.verified, self.control / "locks", self.nodes,
            self.control / "journal",
        ]  # fmt: skip
        self.check_name()
        for place in [self.root, *own]:
            if place != self.root and place.is_symlink():
                raise _is_link(place)  # before anything is changed behind it
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
        """Raise DirectoryUnusable if no JSON can hold the path, as manifests and records must."""
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
        except OSError as error:
            raise _unusable(self.root, error) from None


def _make(place: Path) -> None:
    """Make one directory for its owner alone, and what is missing above it.

    One that exists is left as it is.
    """
    if place.is_dir():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mkdir(place, 0o700)
    except FileExistsError:
        if not place.is_dir():
            raise  # else another process was faster
    sync_directory(place.parent)


def _is_link(place: Path) -> DirectoryUnusable:
    # What is deleted below it would be deleted elsewhere.
    return DirectoryUnusable(
        f"{place} is a link, or no directory: remove it, or choose another --dir"
    )


def _unusable(place: Path, error: OSError) -> DirectoryUnusable:
    why = "it is no directory" if isinstance(error, FileExistsError) else error.strerror
    return DirectoryUnusable(f"cannot use {place}: {why}; choose another directory")
