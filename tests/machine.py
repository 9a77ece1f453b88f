"""A machine of its own on this one: a real systemd as PID 1, over an overlay of ``/``.

Inside, the files are those of this host, and writes go to memory. Nothing that the machine's
systemd does reaches the host, except in the directories that a test shares. The host's own units
are not started. Needs root, systemd and cgroup v2; everything goes when the context ends.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
BOOT_SECONDS = 40.0  # it takes less than 1 on an idle host
_NUMBERS = itertools.count()
_PROGRAMS = ("unshare", "nsenter", "setpriv", "pivot_root", "mount", "umount", "systemctl")
_SYSTEMD = Path("/lib/systemd/systemd")
_NAMESPACES = ["--mount", "--pid", "--uts", "--ipc", "--net"]
_ALL = ("-m", "-p", "-u", "-i", "-n", "-C", "-r", "-w")  # for nsenter
_FRESH = ("/dev", "/proc", "/run", "/sys", "/tmp")  # the machine has its own

# What a machine must not do to the kernel that it shares with its host.
_DENIED = "-sys_module,-sys_rawio,-sys_time,-syslog"
# They take time, or are about the host's devices and files.
_MASKED = (
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-remount-fs.service",
    "systemd-sysctl.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-clean.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tmpfiles-setup.service",
    "systemd-update-utmp.service",
)

# PID 1 alone is in the machine's cgroup, $1, which is then the root of what it sees.
_ENTER = 'echo 0 > "$1/cgroup.procs"; shift; exec unshare --cgroup "$@"'

# The machine's files come to $1; $2 is the console.
_MOUNT = """
umask 022
mount --make-rprivate /
mount -t tmpfs -o size=2g,mode=755 tmpfs "$1"
cd "$1"
mkdir upper work root
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work overlay root
cd root
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755,size=64m tmpfs run
mount -t tmpfs -o mode=1777,size=512m tmpfs tmp
mount -t tmpfs -o mode=755,size=1m tmpfs dev
mkdir dev/shm dev/pts
mount -t tmpfs -o mode=1777,size=512m tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
touch dev/console
mount --bind "$2" dev/console
mount -t tmpfs -o mode=755,size=16m tmpfs etc/systemd/system
"""
_LEAVE_HOST = """
mkdir tmp/host
pivot_root . tmp/host
cd /
umount -l /tmp/host
rmdir /tmp/host
"""
# Only now is a link in a path one of the machine's own.
_WRITE = r"""
for node in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "/dev/${node%:*}" c 1 "${node#*:}"
done
mknod -m 666 /dev/tty c 5 0
ln -s pts/ptmx /dev/ptmx
ln -s /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do
    ln -s "/proc/self/fd/${number%:*}" "/dev/${number#*:}"
done
rm -f /etc/fstab /etc/hostname /etc/hosts /etc/machine-id /etc/resolv.conf
touch /etc/fstab /etc/resolv.conf
echo machine > /etc/hostname
echo 127.0.0.1 localhost machine > /etc/hosts
echo 0123456789abcdef0123456789abcdef > /etc/machine-id
mkdir -p /etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nRateLimitBurst=0\n' > /etc/systemd/journald.conf.d/test.conf
printf '[Unit]\nRequires=basic.target\nAfter=basic.target\n' > /etc/systemd/system/test.target
"""
_BOOT = f"exec env -i PATH=$PATH LANG=C.UTF-8 container=test {_SYSTEMD} --unit=test.target"


def why_not() -> str:
    """Return why such a machine cannot be made here; empty if it can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if not _SYSTEMD.exists():
        return "no systemd"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}"
    if _own_cgroup() is None:
        return "no cgroup v2 to write to"
    trial = "mount -t tmpfs tmpfs /tmp && cd /tmp && mkdir u w r && mount -t overlay"
    trial += " -o lowerdir=/,upperdir=u,workdir=w overlay r"
    probe = ["unshare", "--fork", *_NAMESPACES, "sh", "-c", trial]
    return (
        ""
        if subprocess.run(probe, capture_output=True).returncode == 0
        else "no namespaces or overlays"
    )


class Machine:
    """A booted machine, to which a test gives its units.

    This interpreter, its packages and this repository are at their paths inside, and any user may
    pass to them, even where the host keeps them below root's home. ``/tmp``, ``/run`` and
    ``/dev/shm`` are the machine's own, and so are the network, with a loopback only, and the names.

    A service with ``PrivateTmp=`` does not see a shared directory below ``/tmp``, unless its
    ``BindPaths=`` names it. Limits of memory, tasks and processor time do nothing where the host
    has those controllers in cgroup v1.

    Args:
        directory: for the console's log and a mount point.
        shared: directories that are the same inside, at the same path, to read and write.
    """

    def __init__(self, directory: Path, shared: Iterable[Path] = ()):
        self.directory = directory.resolve()
        self.shared = [path.resolve() for path in shared]
        self.files = self.directory / "machine"
        self.log = self.directory / "console"
        self.cgroup: Path | None = None
        self.process: subprocess.Popen | None = None  # unshare, PID 1's parent
        self.init: psutil.Process | None = None  # PID 1
        self.reader: threading.Thread | None = None

    # -- booting and ending -----------------------------------------------------------------

    def __enter__(self) -> "Machine":
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _boot(self) -> None:
        own = _own_cgroup()
        assert own is not None
        self.files.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self.cgroup = own / f"elastic-ckpt-machine-{os.getpid()}-{next(_NUMBERS)}"
        self.cgroup.mkdir()
        master, slave = os.openpty()
        try:
            self.reader = threading.Thread(target=_copy, args=(master, self.log), daemon=True)
            self.reader.start()
            lines = [_MOUNT, *self._binds(), _LEAVE_HOST, *_passable(), _WRITE, *_mask(), _BOOT]
            command = [
                "setpriv", f"--bounding-set={_DENIED}", "--pdeathsig=KILL",  # with the test's end
                "unshare", "--fork", "--kill-child", *_NAMESPACES,
                "sh", "-euc", _ENTER, "sh", str(self.cgroup),
                "sh", "-euc", "\n".join(lines), "sh", str(self.files), os.ttyname(slave),
            ]  # fmt: skip
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave,
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(slave)
        limit = time.monotonic() + BOOT_SECONDS
        while not self._booted():
            if self.process.poll() is not None or time.monotonic() > limit:
                raise AssertionError(f"the machine did not boot:\n{self.console()}")
            time.sleep(0.05)

    def _booted(self) -> bool:
        assert self.process is not None
        if self.init is None:
            # Before it is systemd, it may still have the host's root, and the host's systemd.
            with contextlib.suppress(OSError, psutil.Error):
                children = psutil.Process(self.process.pid).children()
                if children and Path(children[0].exe()).name == _SYSTEMD.name:
                    self.init = children[0]
            return False
        return self.run("systemctl", "is-active", "test.target", check=False).strip() == "active"

    def _binds(self) -> Iterator[str]:
        """Return what the overlay does not show, and what the test shares."""
        hidden = [(path, "ro") for path in _needed() if not _is_shown(path)]
        for path, mode in [*hidden, *((path, "rw") for path in self.shared)]:
            source, target = shlex.quote(str(path)), shlex.quote(str(path)[1:])
            yield f"mkdir -p {target} && mount --bind {source} {target}"
            if mode == "ro":
                yield f"mount -o remount,bind,ro {target}"

    def close(self) -> None:
        """End it at once; with PID 1 go all processes, and with the last one its mounts."""
        if self.process is not None:
            if self.init is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.init.kill()
            else:
                self.process.kill()
            self.process.wait(20)
        if self.cgroup is not None:
            _remove(self.cgroup)
        if self.reader is not None:
            self.reader.join(10)
        if self.files.exists():
            self.files.rmdir()

    def wait(self, seconds: float = 180.0) -> int:
        """Wait for the machine's own end.

        Returns:
            -SIGINT after a power-off, -SIGHUP after a reboot: so the kernel tells the parent of
            such a PID 1.
        """
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not down in {seconds} s:\n{self.console()}") from None

    # -- from the inside --------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, seconds: float = 90.0, given: str = "") -> str:
        """Return a command's output inside, as root, with ``given`` as its input."""
        assert self.init is not None
        enter = ["nsenter", "-t", str(self.init.pid), *_ALL]
        found = subprocess.run(
            [*enter, *command], capture_output=True, text=True, input=given, timeout=seconds
        )
        if check and found.returncode != 0:
            raise AssertionError(
                f"{shlex.join(command)}: exit {found.returncode}\n{found.stdout}{found.stderr}"
            )
        return found.stdout

    def write(self, path: str, text: str) -> None:
        # Not through /proc/PID/root: a link in there may lead to the host's files.
        self.run("mkdir", "-p", str(Path(path).parent))
        self.run("tee", path, given=text)

    def read(self, path: str) -> str:
        return self.run("cat", path)

    def systemctl(self, *arguments: str, check: bool = True, seconds: float = 180.0) -> str:
        return self.run("systemctl", *arguments, check=check, seconds=seconds)

    def keep(self, *units: str) -> None:
        """Let PID 1 keep these units after a clean end.

        It unloads such a unit, which then shows a fresh one's values, unless another names it.
        """
        for unit in units:
            self.write(f"/etc/systemd/system/test.target.d/{unit}.conf", f"[Unit]\nAfter={unit}\n")
        self.systemctl("daemon-reload")

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return a unit's properties, all if none is named; see ``keep``."""
        options = [f"--property={name}" for name in properties]
        lines = self.systemctl("show", unit, *options).splitlines()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def until(
        self,
        unit: str,
        condition: Callable[[dict[str, str]], bool],
        what: str,
        seconds: float = 90.0,
    ) -> dict[str, str]:
        """Wait, bounded, until ``condition`` is true of the unit's properties; returns them."""
        limit = time.monotonic() + seconds
        while True:
            shown = self.show(unit)
            if condition(shown):
                return shown
            if time.monotonic() > limit:
                state = {name: shown.get(name) for name in ("ActiveState", "SubState", "Result")}
                raise AssertionError(
                    f"not within {seconds} s: {what}; {unit} is {state}\n{self.journal(unit)}"
                )
            time.sleep(0.05)

    def journal(self, unit: str) -> str:
        """Return a unit's output and PID 1's messages about it, with monotonic times."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--output=short-monotonic", f"--unit={unit}")

    # -- from the outside -------------------------------------------------------------------

    def console(self) -> str:
        """Return the end of the console output."""
        written = self.log.read_bytes() if self.log.exists() else b""
        return written.decode(errors="replace").replace("\r", "")[-6000:]

    def host_pid(self, pid: int) -> int:
        """Return the host's pid of a process that is ``pid`` inside."""
        assert self.init is not None
        space = Path(f"/proc/{self.init.pid}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "ns" / "pid").readlink() == space:
                    status = (process / "status").read_text()
                    names = next(x for x in status.splitlines() if x.startswith("NSpid:"))
                    if int(names.split()[-1]) == pid:
                        return int(process.name)
        raise AssertionError(f"no process {pid} in the machine")


def _needed() -> list[Path]:
    """Return what our service reads: the interpreter, its packages, and this repository."""
    paths = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).parent, REPOSITORY]
    paths.append(Path(sys.executable).resolve().parent)
    return sorted({path.absolute() for path in paths} | {path.resolve() for path in paths})


def _is_shown(path: Path) -> bool:
    """Whether an overlay of ``/`` shows it: no mount hides it here or in the machine."""
    if any(path.is_relative_to(fresh) for fresh in _FRESH):
        return False
    return all(mount == Path("/") or not path.is_relative_to(mount) for mount, *_ in _mounts())


def _mounts() -> Iterator[tuple[Path, str, str]]:
    """Yield mount point, mounted part of the file system, and type."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        yield (
            Path(point.encode().decode("unicode_escape").encode("latin-1").decode()),
            root,
            after.split()[0],
        )


def _own_cgroup() -> Path | None:
    """Return this process's cgroup in the unified hierarchy, if one can be made below it."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    for point, root, kind in _mounts():
        if kind == "cgroup2" and own is not None and Path(own).is_relative_to(root):
            found = point / Path(own).relative_to(root)
            return found if os.access(found, os.W_OK) else None
    return None


def _passable() -> Iterator[str]:
    """Make a service's files reachable for any user, in the overlay's copy of a directory."""
    closed = {
        above
        for path in _needed()
        for above in [path, *path.parents]
        if not above.stat().st_mode & stat.S_IXOTH and _is_shown(above)
    }
    for path in sorted(closed):
        yield f"chmod o+x {shlex.quote(str(path))}"


def _mask() -> Iterator[str]:
    for unit in _MASKED:
        yield f"ln -s /dev/null /etc/systemd/system/{unit}"


def _copy(master: int, log: Path) -> None:
    """Drain the console: a full one would block PID 1."""
    with open(log, "ab", buffering=0) as file, contextlib.suppress(OSError):  # all have closed it
        while True:
            file.write(os.read(master, 4096))
    os.close(master)


def _remove(cgroup: Path, seconds: float = 10.0) -> None:
    """Remove a tree of cgroups after its last process has ended."""
    limit = time.monotonic() + seconds
    while cgroup.exists():
        try:
            for path, _, _ in os.walk(cgroup, topdown=False):
                Path(path).rmdir()
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.02)
