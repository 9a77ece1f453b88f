"""File systems to mount for a test: on loop devices, and served to two mounts as to two hosts.

Everything needs root. What a context mounted or started is gone when it ends: mounts by their
path, servers by their process id.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests import s3

MB = 1024 * 1024
MOUNT_SECONDS = 60.0
_SFTP = Path("/usr/lib/openssh/sftp-server")
_NEEDS = {
    "ext4": ("mkfs.ext4",),
    "xfs": ("mkfs.xfs", "xfs_quota"),
    "btrfs": ("mkfs.btrfs", "btrfs"),
    "overlay": (),
    "bindfs": ("bindfs",),
    "sshfs": ("sshfs",),
    "glusterfs": ("glusterd", "gluster", "glusterfs", "unshare", "nsenter"),
    "s3fs": ("s3fs",),
}
_FUSE = ("bindfs", "sshfs", "glusterfs", "s3fs")
_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
_HOST = """
hostname "$1"
mount --bind "$2" /proc/sys/kernel/random/boot_id
mount -t tmpfs -o size=256m tmpfs /dev/shm
shift 2
exec "$@"
"""


GIVEN = os.environ.get("ELASTIC_CKPT_TEST_MOUNTS", "")
"""Two mounts that were made elsewhere, and the directory that they show: KIND:PATH:PATH:PATH."""


def why_not(kind: str) -> str:
    """Return why a kind of file system cannot be mounted here; empty if it can."""
    if GIVEN:
        return ""
    if os.geteuid() != 0:
        return "mounts need root"
    missing = [name for name in _NEEDS[kind] if shutil.which(name) is None]
    if missing:
        return f"{kind} needs {', '.join(missing)}"
    if kind in _FUSE and not Path("/dev/fuse").exists():
        return f"{kind} needs /dev/fuse"
    if kind == "sshfs" and not _SFTP.exists():
        return f"sshfs needs {_SFTP}"
    if kind == "s3fs" and s3.program("weed") is None:
        return "s3fs needs a server: pip install -r requirements/storage.txt"
    if kind in _MAKE and not Path("/dev/loop-control").exists():
        return f"{kind} needs loop devices"
    known = Path("/proc/filesystems").read_text().split()
    if kind in (*_MAKE, "overlay") and kind not in known:
        return f"this kernel has no {kind}"
    return ""


class Mounted:
    """A file system that is mounted once or twice.

    Attributes:
        places: its mount points.
        servers: the FUSE processes, one for each mount point; empty for a file
            system of the kernel.
        version: for people.
        exported: the directory on the server; None if it is not on this machine.
    """

    def __init__(
        self,
        kind: str,
        places: list[Path],
        version: str,
        servers: list[psutil.Process],
        exported: Path | None = None,
    ) -> None:
        self.kind = kind
        self.exported = exported
        self.start: Callable[[Path], psutil.Process] | None = None  # a FUSE server
        self.places = places
        self.version = version
        self.servers = servers

    def take_away(self, number: int) -> None:
        """Kill a FUSE server: each call to its mount is an error."""
        self.servers[number].kill()
        self.servers[number].wait(30)

    def bring_back(self, number: int) -> None:
        """Mount it again in the same place."""
        unmount(self.places[number])
        assert self.start is not None
        self.servers[number] = self.start(self.places[number])

    def stop_answering(self, number: int) -> None:
        """Let every call to a mount hang, as with a file server that is gone."""
        self.servers[number].send_signal(signal.SIGSTOP)

    def answer(self, number: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.servers[number].send_signal(signal.SIGCONT)


@contextlib.contextmanager
def mounted(kind: str, root: Path, count: int = 1) -> Iterator[Mounted]:
    """Mount a file system at ``count`` places below ``root``."""
    if GIVEN:
        _, *places, exported = GIVEN.split(":")
        yield Mounted(kind, [*map(Path, places)], _version(""), [], Path(exported))
        return
    root.mkdir(parents=True, exist_ok=True)
    places = [root / f"mount-{number}" for number in range(count)]
    for place in places:
        place.mkdir()
    with contextlib.ExitStack() as stack:
        made = Mounted(kind, places, _version(kind), [])
        if kind in _MAKE:
            assert count == 1, "a disk cannot be mounted by two hosts"
            stack.enter_context(disk(kind, root / "disk", places[0]))
        elif kind == "overlay":
            stack.enter_context(_overlay(root, places[0]))
        else:
            command = stack.enter_context(_SERVED[kind](root))
            made.start = lambda place: stack.enter_context(_fuse([*command, str(place)], place))
            made.servers = [made.start(place) for place in places]
        yield made


@contextlib.contextmanager
def disk(
    kind: str, image: Path, place: Path, megabytes: int = 400, options: str = ""
) -> Iterator[None]:
    """Mount a new file system on a loop device."""
    with open(image, "wb") as file:
        file.truncate(megabytes * MB)
    run(*_MAKE[kind], str(image))
    run(
        "mount", "-t", kind, "-o", ",".join(filter(None, ["loop", options])), str(image), str(place)
    )
    try:
        yield
    finally:
        unmount(place)
        image.unlink()


@contextlib.contextmanager
def _overlay(root: Path, place: Path) -> Iterator[None]:
    for name in ("lower", "upper", "work"):
        (root / name).mkdir()
    layers = f"lowerdir={root}/lower,upperdir={root}/upper,workdir={root}/work"
    run("mount", "-t", "overlay", "-o", layers, "overlay", str(place))
    try:
        yield
    finally:
        unmount(place)


@contextlib.contextmanager
def _fuse(command: list[str], place: Path) -> Iterator[psutil.Process]:
    """Run a FUSE server in the foreground until the context ends."""
    log = place.with_name(f"{place.name}.log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        limit = time.monotonic() + MOUNT_SECONDS
        while not (is_mounted(place) and os.path.ismount(place)):
            assert process.poll() is None and time.monotonic() < limit, (
                f"{' '.join(command)} does not mount:\n{log.read_text()[-3000:]}"
            )
            time.sleep(0.05)
        yield psutil.Process(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        unmount(place)
        _kill_group(process)


@contextlib.contextmanager
def _bindfs(root: Path) -> Iterator[list[str]]:
    (root / "served").mkdir()
    yield ["bindfs", "-f", str(root / "served")]


@contextlib.contextmanager
def _sshfs(root: Path) -> Iterator[list[str]]:
    """The real client and the real server of SFTP, without the encryption between them."""
    (root / "served").mkdir()
    ssh = root / "ssh"
    ssh.write_text(f"#!/bin/sh\nexec {_SFTP}\n")
    ssh.chmod(0o755)
    yield ["sshfs", "-f", "-o", f"ssh_command={ssh}", f"host:{root}/served"]


@contextlib.contextmanager
def _s3fs(root: Path) -> Iterator[list[str]]:
    program = s3.program("weed")
    assert program is not None
    (root / "s3").mkdir()
    with s3.server(root / "s3", program) as server:
        passwords = root / "passwords"
        passwords.write_text(f"{s3.KEY}:{s3.SECRET}\n")
        passwords.chmod(0o600)
        options = f"url={server.endpoint},use_path_request_style,passwd_file={passwords}"
        yield ["s3fs", "-f", "-o", options, s3.BUCKET]


_GLUSTERD = """
mount --make-rprivate /
for place in /run /var/lib/glusterd /var/log/glusterfs; do mount -t tmpfs tmpfs "$place"; done
mkdir /run/gluster
ip link set lo up
ip address add 10.78.0.1/32 dev lo
exec glusterd -N --pid-file=/run/gluster/pid
"""


@contextlib.contextmanager
def _glusterfs(root: Path) -> Iterator[list[str]]:
    """A volume of two replicated bricks, whose servers are in namespaces of their own."""
    with open(root / "glusterd.log", "wb") as log:
        process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sh", "-ec", _GLUSTERD],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        _until_answers(process, root)
        inner = str(psutil.Process(process.pid).children()[0].pid)
        inside = ["nsenter", "-t", inner, "--net", "--mount", "--pid"]
        gluster = [*inside, "gluster", "--mode=script"]
        bricks = [f"10.78.0.1:{root}/brick-{number}" for number in range(2)]
        run(*gluster, "volume", "create", "jobs", "replica", "2", *bricks, "force")
        run(*gluster, "volume", "start", "jobs")
        client = ["glusterfs", "--no-daemon", f"--log-file={root}/client.log"]
        server = ["--volfile-server=10.78.0.1", "--volfile-id=jobs"]
        yield ["nsenter", "-t", inner, "--net", *client, *server]
    finally:
        for child in psutil.Process(process.pid).children():
            child.kill()  # it is PID 1 of the namespace, with which all of its processes go
        process.wait(30)


def _until_answers(process: subprocess.Popen[bytes], root: Path) -> None:
    limit = time.monotonic() + MOUNT_SECONDS
    while True:
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        if children:
            asked = subprocess.run(
                ["nsenter", "-t", str(children[0].pid), "--net", "--mount", "--pid", "gluster",
                 "--mode=script", "peer", "status"],
                capture_output=True, timeout=30, check=False,
            )  # fmt: skip
            if asked.returncode == 0:
                return
        assert process.poll() is None and time.monotonic() < limit, (
            f"glusterd does not start:\n{(root / 'glusterd.log').read_text()[-3000:]}"
        )
        time.sleep(0.3)


_SERVED = {"bindfs": _bindfs, "sshfs": _sshfs, "glusterfs": _glusterfs, "s3fs": _s3fs}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a server and its children, which have a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def _version(kind: str) -> str:
    if kind not in _FUSE:
        return f"Linux {os.uname().release}"
    found = subprocess.run([kind, "--version"], capture_output=True, text=True, check=False)
    lines = (found.stdout + found.stderr).splitlines()
    return next((line for line in lines if line.lower().startswith(kind)), lines[0])


def unmount(place: Path) -> None:
    """Unmount; lazily if something still holds it, which must not outlive the test."""
    for _ in range(50):
        if not is_mounted(place):
            return
        if subprocess.run(["umount", str(place)], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    run("umount", "-l", str(place))


def is_mounted(place: Path) -> bool:
    """Return whether something is mounted there; asks the kernel, not the file system."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return any(line.split()[1] == str(place) for line in lines)


def run(*command: str, seconds: float = 60.0) -> str:
    found = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert found.returncode == 0, f"{' '.join(command)}: {found.stdout}{found.stderr}"
    return found.stdout


def as_another_host(root: Path, name: str) -> list[str]:
    """Return what to put before a command so that it runs as on another host: with another name,
    another boot, and memory of its own. Mounts that are there are seen."""
    boot = root / f"boot-{name}"
    boot.write_text(f"00000000-0000-4000-8000-{abs(hash(name)) % 10**12:012d}\n")
    inner = ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-ec", _HOST]
    return [*inner, "sh", name, str(boot)]


def holds_flock(one: Path, other: Path) -> bool:
    """Return whether a lock that is taken through one mount is respected by the other one."""
    path = "locked"
    with open(one / path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        code = (
            "import fcntl, sys\n"
            "try: fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "except BlockingIOError: sys.exit(3)\n"
        )
        tried = subprocess.run([sys.executable, "-c", code, str(other / path)], timeout=300)
    assert tried.returncode in (0, 3)
    return tried.returncode == 3
