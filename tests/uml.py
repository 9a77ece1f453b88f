"""A machine with a kernel of its own on this one: user-mode Linux, with this host's files.

Its kernel has an NFS server and client, which the host's may lack. The guest sees the host's ``/``
read-only, and one directory of the test to write to. Needs root and Debian's ``user-mode-linux``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import psutil

from tests import mounts

MODULES = Path("/usr/lib/uml/modules")
_NEEDS = (
    "linux.uml",
    "busybox",
    "ip",
    "rpcbind",
    "rpc.statd",
    "rpc.nfsd",
    "rpc.mountd",
    "exportfs",
)

# The guest's kernel gives back what it read of a process's registers, cut to the size that it
# knows; the host's refuses that where the processor has more (AMX). The rest stays as it was.
_REGISTERS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>
static char whole[65536];
long ptrace(enum __ptrace_request request, ...)
{
    static long (*real)(int, pid_t, void *, void *);
    va_list list;
    va_start(list, request);
    pid_t pid = va_arg(list, pid_t);
    void *address = va_arg(list, void *), *data = va_arg(list, void *);
    va_end(list);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "ptrace");
    if (request == PTRACE_SETREGSET && (long)address == NT_X86_XSTATE) {
        struct iovec *given = data, all = {whole, sizeof whole};
        if (real(PTRACE_GETREGSET, pid, address, &all) == 0 && all.iov_len > given->iov_len) {
            memcpy(whole, given->iov_base, given->iov_len);
            return real(request, pid, address, &all);
        }
    }
    return real(request, pid, address, data);
}
"""

_INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/run/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mkdir -p /run/tmp /run/kernel/lib
ln -s {modules} /run/kernel/lib/modules
mount -t hostfs -o {root} none {root}
exec > {root}/guest.log 2>&1 < /dev/null
ip link set lo up
hostname guest
{commands}
echo "guest done: $?"
sync
busybox poweroff -f
"""

NFS_SERVER = """
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
"""Starts an NFS server of ``/run/export``, an ext4 on the first disk."""


def why_not() -> str:
    """Return why no guest with NFS can be booted here; empty if one can."""
    if os.geteuid() != 0:
        return "the guest's mounts need root"
    missing = [name for name in _NEEDS if shutil.which(name) is None]
    if missing:
        return f"NFS needs {', '.join(missing)}"
    if not MODULES.exists():
        return f"NFS needs {MODULES}"
    if _is_wide() and shutil.which("cc") is None:
        return "user-mode Linux needs a C compiler on a processor with AMX"
    return ""


def run(root: Path, commands: str, seconds: float, *, megabytes: int = 3000) -> str:
    """Boot a guest that runs shell commands and powers off; return what they printed.

    Args:
        root: an empty directory, which the guest sees at the same path and may write to.
        seconds: after which it is killed, and the test fails.
    """
    init, image, console = root / "init", root / "disk", root / "console"
    init.write_text(
        _INIT.format(modules=MODULES, root=shlex.quote(str(root)), commands=commands.strip())
    )
    init.chmod(0o755)
    with open(image, "wb") as file:
        file.truncate(512 * mounts.MB)
    mounts.run("mkfs.ext4", "-q", "-F", str(image))
    command = [
        "linux.uml", f"mem={megabytes}M", "rootfstype=hostfs", "rootflags=/", "ro",
        f"ubda={image}", f"init={init}", f"uml_dir={root}/", "con=null", "con0=null,fd:1",
        "con1=null",
    ]  # fmt: skip
    with open(console, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, env=os.environ | _preloaded(root),
        )  # fmt: skip
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the guest runs for {seconds} s\n{_printed(root)}") from None
    finally:
        _end(process)
        image.unlink()
    return _printed(root)


def _is_wide() -> bool:
    return " amx_tile" in Path("/proc/cpuinfo").read_text()


def _preloaded(root: Path) -> dict[str, str]:
    if not _is_wide():
        return {}
    source, library = root / "registers.c", root / "registers.so"
    source.write_text(_REGISTERS)
    mounts.run("cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
    return {"LD_PRELOAD": str(library)}


def _printed(root: Path) -> str:
    log, console = root / "guest.log", root / "console"
    if log.exists():
        return log.read_text(errors="replace")
    return console.read_text(errors="replace")[-3000:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the guest, whose processes are processes of this host in the same session."""
    for one in psutil.process_iter():
        try:
            if os.getsid(one.pid) == process.pid:
                one.send_signal(signal.SIGKILL)
        except (psutil.Error, ProcessLookupError):
            continue
    process.wait(30)
