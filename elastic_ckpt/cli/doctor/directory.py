"""The directory that checkpoints are to go to: what is there, and what fits beside it."""

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

from elastic_ckpt.checkpoint.catalog import newest_intact
from elastic_ckpt.checkpoint.memory.tier import tier_of, tier_path
from elastic_ckpt.checkpoint.space import RESERVE_BYTES, free_bytes
from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.errors import DirectoryUnusable, UsageError
from elastic_ckpt.jobdir.node_record import node_name
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.prediction_file import read_predictor
from elastic_ckpt.jobdir.slurm_jobs import find_job, is_job_number
from elastic_ckpt.policy.emergency import Outlook, save_seconds
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer
from elastic_ckpt.util.units import human_bytes

MEMORY: Final = Path("/dev/shm")

_LOOK_SECONDS: Final = 20.0


class Place(msgspec.Struct, frozen=True):
    """A directory for checkpoints, as it is now.

    Attributes:
        root: absolute, without links.
        tried: it, or what is there above it while it is not.
        free_bytes: what this user may still write.
        newest: name of the newest intact checkpoint; empty if there is none.
        state_bytes: of that checkpoint; 0 if there is none.
        saved_seconds: what a save of it takes at the worst, as the job's own saves have it; None
            if there were none.
        held_bytes: what the job's memory tier on this node takes already.
    """

    root: str
    tried: str
    free_bytes: int
    newest: str = ""
    state_bytes: int = 0
    saved_seconds: float | None = None
    held_bytes: int = 0

    @property
    def is_there(self) -> bool:
        """Whether the directory exists."""
        return self.root == self.tried


def named(directory: str | None) -> str | None:
    """A directory, or that of a SLURM job if it is the number of one.

    Raises:
        UsageError: nothing is known of that job.
    """
    if directory is None or not is_job_number(directory) or os.path.lexists(directory):
        return directory
    found = find_job(directory)
    if found is None:
        raise UsageError(
            f"no directory {directory}, and of no SLURM job {directory} the directory is known "
            "here: give it"
        )
    return str(found)


def look_at(directory: str | None) -> Place | Finding:
    """What is there; a finding if that cannot be said."""
    if directory is None:
        return ok("directory", "not tried: give the directory that checkpoints go to (doctor DIR)")
    try:
        found: Place = answer(lambda: _look(directory), Place, _LOOK_SECONDS)
    except NoAnswer as error:
        todo = "see whether the storage is up: a run would wait for it, too"
        return Finding("directory", "problem", f"{directory}: {error}", todo)
    except WorkFailed as error:
        todo = "run as its owner, or choose another directory"
        return Finding("directory", "problem", f"{directory}: {error}", todo)
    return found


def check_directory(place: Place) -> Iterator[Finding]:
    """What it holds, and whether two more checkpoints fit."""
    if not place.is_there:
        yield ok("directory", f"{place.root} is to be made: tried was {place.tried}")
    elif place.newest:
        size = human_bytes(place.state_bytes)
        text = f"{place.root}: {place.newest} is the newest intact checkpoint, {size}"
        yield ok("directory", text, place.state_bytes, "bytes")
    else:
        yield ok("directory", f"{place.root}: no intact checkpoint yet")
    yield _space(place)


def _space(place: Place) -> Finding:
    free, state = place.free_bytes, place.state_bytes
    if free == sys.maxsize:
        return ok("free space", "the file system does not say")
    text = f"{human_bytes(free)} free"
    if not state:
        return ok("free space", text, free, "bytes")
    fits = max(0, free - RESERVE_BYTES) // state
    if fits >= 2:
        text += f": room for {fits:,} more checkpoints"
        return ok("free space", text, free, "bytes")
    text += f", and a checkpoint takes {human_bytes(state)}"
    todo = "delete something there, or keep fewer checkpoints (--keep-last)"
    # One is written before an old one goes.
    return Finding("free space", "warning" if fits else "problem", text, todo, free, "bytes")


def _look(directory: str) -> Generator[Place, None, None]:
    job = JobDirectory.at(directory)
    tried = _nearest(job.root)
    place = Place(str(job.root), str(tried), free_bytes(tried))
    newest = newest_intact(job) if tried == job.root else None
    if newest is not None and newest.manifest is not None:
        size = newest.manifest.total_bytes
        tier = tier_of(job, str(tier_path(MEMORY, job, node_name())))
        place = msgspec.structs.replace(
            place,
            newest=newest.path.name,
            state_bytes=size,
            saved_seconds=save_seconds(read_predictor(job), Outlook(0.0, 0.0, size)),
            held_bytes=tier.held_bytes() if tier else 0,
        )
    yield place


def _nearest(path: Path) -> Path:
    """It, or the directory above it that is there.

    Raises:
        DirectoryUnusable: what is there is none.
        OSError: this user may not see it.
    """
    while True:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
            continue
        if not stat.S_ISDIR(found.st_mode):
            raise DirectoryUnusable(f"{path} is no directory")
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
