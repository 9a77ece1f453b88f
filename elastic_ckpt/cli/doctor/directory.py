"""The job directory: its file system, its checkpoints, and whether more will fit."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.catalog import newest_of_job
from elastic_ckpt.checkpoint.disk.space import RESERVE_BYTES, free_bytes
from elastic_ckpt.checkpoint.memory.tier import tier_of, tier_path
from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.errors import DirectoryUnusable
from elastic_ckpt.jobdir.node_record import node_name
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.prediction_file import read_predictor
from elastic_ckpt.policy.emergency import Outlook, save_seconds
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer
from elastic_ckpt.util.units import human_bytes

MEMORY: Final = Path("/dev/shm")

INSPECT_SECONDS: Final = 20.0


class CheckedPath(msgspec.Struct, frozen=True):
    """A job directory and what it contains.

    Attributes:
        root: absolute, without links.
        tested: the directory to test: ``root`` or its nearest existing parent.
        free_bytes: what this user can still write.
        newest: name of the newest intact checkpoint; empty if none.
        state_bytes: size of that checkpoint; 0 if none.
        saved_seconds: worst-case duration of a save, from the job's own saves; None without any.
        held_bytes: what the job's memory tier already takes on this node.
    """

    root: str
    tested: str
    free_bytes: int
    newest: str = ""
    state_bytes: int = 0
    saved_seconds: float | None = None
    held_bytes: int = 0

    @property
    def exists(self) -> bool:
        """Whether the directory exists."""
        return self.root == self.tested


def inspect_directory(directory: Path | None) -> CheckedPath | Finding:
    """Inspect a directory in a child process; return a finding if that fails."""
    if directory is None:
        return ok("directory", "not tested: give the job directory (doctor DIR)")
    try:
        found: CheckedPath = answer(lambda: _inspect(directory), CheckedPath, INSPECT_SECONDS)
    except NoAnswer as error:
        todo = "check the storage: a run would block on it as well"
        return Finding("directory", "problem", f"{directory}: {error}", todo)
    except WorkFailed as error:
        todo = "run as its owner, or choose another directory"
        return Finding("directory", "problem", f"{directory}: {error}", todo)
    return found


def check_directory(path: CheckedPath) -> Iterator[Finding]:
    """Check the newest checkpoint, and whether two more fit."""
    if not path.exists:
        yield ok("directory", f"{path.root} does not exist yet; tested {path.tested}")
    elif path.newest:
        size = human_bytes(path.state_bytes)
        text = f"{path.root}: {path.newest} is the newest intact checkpoint, {size}"
        yield ok("directory", text, path.state_bytes, "bytes")
    else:
        yield ok("directory", f"{path.root}: no intact checkpoint yet")
    yield _space(path)


def _space(path: CheckedPath) -> Finding:
    free, state = path.free_bytes, path.state_bytes
    if free == sys.maxsize:
        return ok("free space", "not reported by the file system")
    text = f"{human_bytes(free)} free"
    if not state:
        return ok("free space", text, free, "bytes")
    fits = max(0, free - RESERVE_BYTES) // state
    if fits >= 2:
        text += f": room for {fits:,} more checkpoints"
        return ok("free space", text, free, "bytes")
    text += f", and a checkpoint takes {human_bytes(state)}"
    todo = "free some space, or keep fewer checkpoints (--keep-last)"
    # A checkpoint is written before an old one is deleted.
    return Finding("free space", "warning" if fits else "problem", text, todo, free, "bytes")


def _inspect(directory: Path) -> Generator[CheckedPath, None, None]:
    job = JobDirectory.at(directory)
    tested = _nearest(job.root)
    path = CheckedPath(str(job.root), str(tested), free_bytes(tested))
    newest = newest_of_job(job) if tested == job.root else None
    if newest is not None and newest.manifest is not None:
        size = newest.manifest.total_bytes
        tier = tier_of(job, str(tier_path(MEMORY, job, node_name())))
        path = msgspec.structs.replace(
            path,
            newest=newest.path.name,
            state_bytes=size,
            saved_seconds=save_seconds(read_predictor(job), Outlook(0.0, 0.0, size)),
            held_bytes=tier.held_bytes() if tier else 0,
        )
    yield path


def _nearest(path: Path) -> Path:
    """Return the path or its nearest existing parent.

    Raises:
        DirectoryUnusable: that is not a directory.
        OSError: this user may not access it.
    """
    while True:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
            continue
        if not stat.S_ISDIR(found.st_mode):
            raise DirectoryUnusable(f"{path} is not a directory")
        return path


_LOCAL: Final = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "bcachefs", "nilfs2"}
)
_NETWORK: Final = frozenset(
    {
        "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "smbfs", "9p",
        "virtiofs", "afs", "glusterfs", "panfs", "wekafs", "orangefs", "pvfs2", "ocfs2", "gfs2",
        "fuse.ceph", "fuse.ceph-fuse", "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs", "fuse.mfs",
        "fuse.beegfs", "fuse.lizardfs",
    }
)  # fmt: skip
_OBJECTS: Final = frozenset(
    {
        "s3fs", "gcsfuse", "goofys", "geesefs", "blobfuse", "blobfuse2", "rclone", "ossfs",
        "mountpoint-s3",
    }
)  # fmt: skip
"""Object stores mounted as a directory; a rename there is a copy."""

_TEMPORARY: Final = {
    "overlay": ("is lost with the container", "mount a volume, and use a directory on it"),
    "aufs": ("is lost with the container", "mount a volume, and use a directory on it"),
    "tmpfs": ("is memory, lost with this machine", "use a directory on a disk"),
    "ramfs": ("is memory, lost with this machine", "use a directory on a disk"),
}
_LOCAL_LOCKS: Final = {
    "nolock": "mount it without nolock",
    "local_lock=all": "mount it with local_lock=none",
    "local_lock=flock": "mount it with local_lock=none",
    "localflock": "mount it with flock instead of localflock",
}
"""Mount options that hide a node's locks from other nodes, and what to do."""

_CLOUDS: Final = frozenset({"aws", "gcp", "azure"})


@dataclass(frozen=True)
class Mount:
    """One entry of the mount table.

    Attributes:
        point: where it is mounted.
        kind: for example ``ext4`` or ``fuse.s3fs``.
        source: a device, or a server's name and path.
        options: of the mount and of the file system.
    """

    point: str
    kind: str
    source: str
    options: frozenset[str]


def mount_of(path: str, proc: Path = Path("/proc")) -> Mount | None:
    """Return the mount of a path: the longest mount point above it, the last of equals."""
    best: Mount | None = None
    try:
        lines = (proc / "self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        found = _parse(line)
        if found is None or not _is_below(path, found.point):
            continue
        if best is None or len(found.point) >= len(best.point):
            best = found
    return best


def check_filesystem(
    path: str, platforms: Sequence[str] = (), *, nodes: int = 1, proc: Path = Path("/proc")
) -> Finding:
    """Check the type and mount options of the file system.

    Args:
        platforms: the platforms of this machine.
        nodes: number of nodes of the job, if known.
    """
    found = mount_of(path, proc)
    if found is None:
        return ok("file system", "unknown: cannot read the mount table")
    name = f"{found.kind} ({found.source} on {found.point})"
    if "ro" in found.options:
        return Finding("file system", "problem", f"{name} is read-only", "remount it read-write")
    if found.kind in _TEMPORARY:
        why, todo = _TEMPORARY[found.kind]
        return Finding("file system", "warning", f"{name} {why}", todo)
    if {found.kind.removeprefix("fuse."), found.source} & _OBJECTS:
        text = f"{name} is an object store without atomic renames"
        todo = "use a directory on a disk or a shared file system"
        return Finding("file system", "problem", text, todo)
    if found.kind in _NETWORK:
        return _network(name, found)
    if found.kind in _LOCAL:
        return _local(name, platforms, nodes)
    todo = "check that rename is atomic and fsync durable on it (docs/filesystems.md)"
    return Finding("file system", "warning", f"{name} is not in the list of known types", todo)


def _network(name: str, found: Mount) -> Finding:
    hidden = sorted(found.options & _LOCAL_LOCKS.keys())
    if hidden:
        text = f"{name}, shared, {hidden[0]}: nodes do not see each other's locks"
        todo = f"{_LOCAL_LOCKS[hidden[0]]}, or make sure yourself that a job runs only once"
        return Finding("file system", "warning", text, todo)
    return ok("file system", f"{name}, shared between nodes")


def _local(name: str, platforms: Sequence[str], nodes: int) -> Finding:
    text = f"{name}, local: for one node only"
    if nodes > 1:
        todo = "use a directory that all nodes share"
        return Finding("file system", "warning", f"{text}, but this job has {nodes}", todo)
    if _CLOUDS & set(platforms):
        text += "; a replacement machine needs the same disk"
    return ok("file system", text)


def _parse(line: str) -> Mount | None:
    """Parse ``36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/root rw,errors=continue``."""
    fields, separator, rest = line.partition(" - ")
    before, after = fields.split(" "), rest.split(" ")
    if not separator or len(before) < 6 or len(after) < 3:
        return None
    options = frozenset([*before[5].split(","), *after[2].split(",")])
    return Mount(_decoded(before[4]), _decoded(after[0]), _decoded(after[1]), options)


def _decoded(text: str) -> str:
    r"""Decode space, tab, newline and backslash, which are written as ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent.rstrip("/") + "/")
