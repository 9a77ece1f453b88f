"""An NFS server and two clients in a guest (tests/uml.py), whose kernel has them: many hosts'
kernels have not. Needs Debian's ``nfs-kernel-server``, ``rpcbind`` and ``busybox`` besides."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Final

from tests import mounts, uml

_MODULES: Final = Path("/usr/lib/uml/modules")
_NEEDS: Final = ("ip", "rpcbind", "rpc.statd", "rpc.nfsd", "rpc.mountd", "exportfs", "modprobe")

_SERVER: Final = """
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts /run/tmp /run/kernel/lib
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t devpts devpts /dev/pts
export HOME=/root TMPDIR=/run/tmp
ln -s {modules} /run/kernel/lib/modules
ip link set lo up
for module in nfsd nfsv3 nfsv4; do modprobe -d /run/kernel $module; done
mkdir -p /run/export
mount -t ext4 /dev/ubda /run/export
mount -t tmpfs tmpfs /var/lib/nfs
mkdir -p /var/lib/nfs/sm /var/lib/nfs/sm.bak /var/lib/nfs/v4recovery /var/lib/nfs/rpc_pipefs
touch /var/lib/nfs/etab /var/lib/nfs/rmtab /var/lib/nfs/state
mount -t nfsd nfsd /proc/fs/nfsd
echo 10 > /proc/fs/nfsd/nfsv4leasetime
echo 10 > /proc/fs/nfsd/nfsv4gracetime
echo 10 > /proc/sys/fs/nfs/nlm_grace_period
options=rw,sync,no_root_squash,fsid=0,insecure,no_subtree_check
echo "/run/export 127.0.0.0/8($options)" > /run/exports
mount --bind /run/exports /etc/exports
rpcbind -w
rpc.statd
exportfs -ra
rpc.nfsd 4
rpc.mountd
mkdir -p /run/nfs-0 /run/nfs-1
"""
"""Serves ``/run/export``, an ext4 on the first disk."""


def why_not() -> str:
    """Return why no guest with NFS can be booted here; empty if one can."""
    missing = [name for name in _NEEDS if shutil.which(name) is None]
    return uml.why_not() or (f"NFS needs {', '.join(missing)}" if missing else "")


def run(directory: Path, version: str, commands: str, seconds: float) -> str:
    """Run shell commands beside two mounts of one export, ``/run/nfs-0`` and ``/run/nfs-1``, and
    return what they printed; AssertionError if the last one fails, or all take too long."""
    image, script = directory / "disk", directory / "commands"
    with open(image, "wb") as file:
        file.truncate(512 * mounts.MB)
    mounts.run("mkfs.ext4", "-q", "-F", str(image))
    path = "/" if version.startswith("4") else "/run/export"
    # Two clients to the server: it tells them apart by the name of the host that mounts.
    clients = [
        f"unshare --uts sh -c 'hostname client-{number}; mount -t nfs -o vers={version},"
        f"nosharecache 127.0.0.{number + 1}:{path} /run/nfs-{number}'"
        for number in range(2)
    ]
    server = _SERVER.format(modules=shlex.quote(str(_MODULES)))
    script.write_text("\n".join([server, *clients, commands]))
    try:
        return uml.run(
            directory, ["bash", str(script)], disks=[image], seconds=seconds, megabytes=3000
        )
    finally:
        image.unlink()
