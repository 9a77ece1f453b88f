"""The file system that a directory lies on, by the kernel's table of mounts; nothing is asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_ckpt.cli.doctor.findings import Finding, ok

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
"""Object stores that look like a directory; renames there are copies."""

_TEMPORARY: Final = {
    "overlay": ("goes with the container", "mount a volume, and give a directory on it"),
    "aufs": ("goes with the container", "mount a volume, and give a directory on it"),
    "tmpfs": ("is memory, and goes with this machine", "give a directory on a disk"),
    "ramfs": ("is memory, and goes with this machine", "give a directory on a disk"),
}
_BLIND: Final = {
    "nolock": "mount it without nolock",
    "local_lock=all": "mount it with local_lock=none",
    "local_lock=flock": "mount it with local_lock=none",
    "localflock": "mount it with flock instead of localflock",
}
"""Options with which two nodes do not see each other's locks, and what to do."""

_CLOUDS: Final = frozenset({"aws", "gcp", "azure"})


@dataclass(frozen=True)
class Mount:
    """One line of the table.

    Attributes:
        place: where it is mounted.
        kind: ``ext4``, ``fuse.s3fs``.
        source: a device, or a server's name and path.
        options: of the mount and of the file system.
    """

    place: str
    kind: str
    source: str
    options: frozenset[str]


def mount_of(path: str, proc: Path = Path("/proc")) -> Mount | None:
    """What a path lies on: the longest place above it; of several there the last one covers."""
    best: Mount | None = None
    try:
        lines = (proc / "self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        found = _parse(line)
        if found is None or not _is_below(path, found.place):
            continue
        if best is None or len(found.place) >= len(best.place):
            best = found
    return best


def check_filesystem(
    path: str, platforms: Sequence[str] = (), *, nodes: int = 1, proc: Path = Path("/proc")
) -> Finding:
    """What it is, and what follows from that.

    Args:
        platforms: names of those of this machine.
        nodes: of the job, as far as that is known.
    """
    found = mount_of(path, proc)
    if found is None:
        return ok("file system", "unknown: the kernel shows no table of mounts")
    name = f"{found.kind} ({found.source} on {found.place})"
    if "ro" in found.options:
        return Finding("file system", "problem", f"{name} is read-only", "mount it for writing")
    if found.kind in _TEMPORARY:
        why, todo = _TEMPORARY[found.kind]
        return Finding("file system", "warning", f"{name} {why}", todo)
    if {found.kind.removeprefix("fuse."), found.source} & _OBJECTS:
        text = f"{name} is an object store: renames are not atomic there"
        todo = "give a directory on a disk or a shared file system"
        return Finding("file system", "problem", text, todo)
    if found.kind in _NETWORK:
        return _network(name, found)
    if found.kind in _LOCAL:
        return _local(name, platforms, nodes)
    todo = "see that rename is atomic and fsync durable on it (docs/filesystems.md)"
    return Finding("file system", "warning", f"{name} is not known here", todo)


def _network(name: str, found: Mount) -> Finding:
    blind = sorted(found.options & _BLIND.keys())
    if blind:
        text = f"{name}, shared, {blind[0]}: nodes do not see each other's locks"
        todo = f"{_BLIND[blind[0]]}, or see yourself that a job runs once"
        return Finding("file system", "warning", text, todo)
    return ok("file system", f"{name}, shared: other nodes may see it, too")


def _local(name: str, platforms: Sequence[str], nodes: int) -> Finding:
    text = f"{name}, local: for one node alone"
    if nodes > 1:
        todo = "give a directory that all nodes share"
        return Finding("file system", "warning", f"{text}, and this job has {nodes}", todo)
    if _CLOUDS & set(platforms):
        text += "; the machine that comes after this one must have that disk, too"
    return ok("file system", text)


def _parse(line: str) -> Mount | None:
    """``36 35 98:0 /root /place rw,noatime master:1 - ext3 /dev/root rw,errors=continue``."""
    fields, separator, rest = line.partition(" - ")
    before, behind = fields.split(" "), rest.split(" ")
    if not separator or len(before) < 6 or len(behind) < 3:
        return None
    options = frozenset([*before[5].split(","), *behind[2].split(",")])
    return Mount(_decoded(before[4]), _decoded(behind[0]), _decoded(behind[1]), options)


def _decoded(text: str) -> str:
    r"""Space, tab, newline and backslash are written as ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")
