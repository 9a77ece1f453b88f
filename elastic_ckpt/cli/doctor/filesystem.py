"""The file system of a directory, by the kernel's mount table: no call goes to the storage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_ckpt.cli.doctor.findings import Finding, ok

_LOCAL: Final = frozenset(
    {"ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "bcachefs", "nilfs2"}
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
    "nobrl": "mount it without nobrl",
    "localflock": "mount it with flock instead of localflock",
}
"""Mount options that hide a node's locks from other nodes, and what to do."""

_SLOW: Final = "a save fails where a slow server should only make it wait"
_SHARED: Final = {
    "nocto": ("a node may see what a file of another node was before", "mount it without nocto"),
    "soft": (_SLOW, "mount it with hard instead of soft"),
    "softerr": (_SLOW, "mount it with hard instead of softerr"),
}
"""Mount options of network file systems that cost a save or a start: how, and what to do."""

_UNSYNCED: Final = {
    "data=writeback": (
        "sealed checkpoints are safe, but a file that was not synced before a power cut may have "
        "its size and old data of other files in it",
        "mount it with data=ordered if a script saves there by itself",
    ),
}
"""Mount options that harm only what was never synced: how, and what to do."""

_BARRIERS: Final = "remount it with barriers (mount -o remount,barrier {})"
_UNSAFE: Final = {
    "nobarrier": _BARRIERS,
    "barrier=0": _BARRIERS,
    "fsync_mode=nobarrier": "remount it with fsync_mode=posix",
    "nointegrity": "remount it with integrity",
    "volatile": "mount a volume, or the overlay without volatile",
    "fsync=volatile": "mount a volume, or the overlay without fsync=volatile",
    "nostrictsync": "mount it without nostrictsync",
    "journal_flush_disabled": "mount it without journal_flush_disabled",
}
"""Mount options that make fsync return before the data is durable, and what to do."""

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

    @property
    def is_known(self) -> bool:
        """Whether the kernel itself implements all that checkpoints need on one node."""
        return self.kind in _LOCAL or self.kind in _TEMPORARY


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
    unsafe = sorted(found.options & _UNSAFE.keys())
    if unsafe:
        text = f"{name}, {unsafe[0]}: a crash or power cut can lose sealed checkpoints"
        return Finding("file system", "problem", text, _UNSAFE[unsafe[0]].format(found.point))
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
        return _local(name, found, platforms, nodes)
    todo = "check that rename is atomic and fsync durable on it (docs/filesystems.md)"
    return Finding("file system", "warning", f"{name} is not in the list of known types", todo)


def _network(name: str, found: Mount) -> Finding:
    hidden = sorted(found.options & _LOCAL_LOCKS.keys())
    if hidden:
        text = f"{name}, shared, {hidden[0]}: nodes do not see each other's locks"
        todo = f"{_LOCAL_LOCKS[hidden[0]]}, or make sure yourself that a job runs only once"
        return Finding("file system", "warning", text, todo)
    for option in sorted(found.options & _SHARED.keys()):
        why, todo = _SHARED[option]
        return Finding("file system", "warning", f"{name}, shared, {option}: {why}", todo)
    return ok("file system", f"{name}, shared between nodes")


def _local(name: str, found: Mount, platforms: Sequence[str], nodes: int) -> Finding:
    text = f"{name}, local: for one node only"
    if nodes > 1:
        todo = "use a directory that all nodes share"
        return Finding("file system", "warning", f"{text}, but this job has {nodes}", todo)
    for option in sorted(found.options & _UNSYNCED.keys()):
        why, todo = _UNSYNCED[option]
        return Finding("file system", "warning", f"{name}, {option}: {why}", todo)
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
