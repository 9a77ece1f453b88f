"""System calls that change a disk: recorded with strace, decoded, and made to fail one by one.

What is traced and what is not: the calls of ``FAMILIES``. ``read``, ``close``, ``stat``,
``getdents64`` and the like change nothing on the disk, so a kill at one of them leaves what a
kill at the next traced call leaves. Calls on paths outside the job directory (the child's own
standard error) are counted, because strace counts them, but are not injected.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.store_writer import PATIENCE

FAMILIES: dict[str, tuple[str, ...]] = {
    "write": ("write", "pwrite64", "writev"),
    "sync": ("fsync", "fdatasync"),
    "rename": ("rename", "renameat", "renameat2"),
    "mkdir": ("mkdir", "mkdirat"),
    "link": ("link", "linkat"),
    "unlink": ("unlink", "unlinkat", "rmdir"),
    "open": ("open", "openat", "creat"),
    "size": ("ftruncate", "fallocate"),
    "mode": ("fchmod", "chmod", "fchmodat"),
}
TRACED = tuple(name for names in FAMILIES.values() for name in names)

RECORDED_TOO = ("lseek", "sync", "syncfs")
"""What the simulated disk needs to know besides; changes nothing that could fail."""

UNKNOWN_TO_US = (
    "truncate", "copy_file_range", "sendfile", "splice", "pwritev", "pwritev2", "symlink",
    "symlinkat", "mknodat", "sync_file_range", "io_uring_enter", "fchmodat2",
)  # fmt: skip
"""Other ways to change a disk. A save that begins to use one must be noticed here."""

KILL, EIO, ENOSPC, FULL = "KILL", "EIO", "ENOSPC", "ENOSPC for good"
MODES = (KILL, EIO, ENOSPC, FULL)
"""What happens at a call; the last one to all later calls of its name, too."""

_INJECTED = {
    KILL: "signal=KILL:when={}",
    EIO: "error=EIO:when={}",
    ENOSPC: "error=ENOSPC:when={}",
    FULL: "error=ENOSPC:when={}+",
}
_LINE = re.compile(r"(?:(\d+) +)?(\w+)\((.*)\) += (.*)")
_OTHER = re.compile(r"(?:\d+ +)?(?:---|\+\+\+) .*")
_TOKEN = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?|<((?:\\x[0-9a-f]{2}|[^<>])*)>')
_IDENTITY = re.compile(r"/(?:\d+\.)?\d+-[0-9a-f]{16}(?=/|$)")
_STAMP = re.compile(r"-\d{8}T\d{6}Z-[0-9a-f]+")
_TEMPORARY = re.compile(r"(/\.tmp-.*)-[0-9a-f]+$|(/\.tmp)[0-9A-Za-z]{6}$")
"""The store's own, and those of the library that writes safetensors."""


@dataclass(frozen=True)
class Call:
    """One system call of a traced process.

    Attributes:
        count: which call of this name it is, from 1: strace's ``when``.
        paths: of its descriptors and path arguments in their order, absolute.
        data: the buffer of a write.
        result: what it returned; None if the process was killed in it or it failed.
        error: such as ``EEXIST``, else empty.
        rest: its arguments without strings, for flags and offsets.
    """

    pid: int
    name: str
    count: int
    paths: tuple[str, ...]
    data: bytes
    result: int | None
    error: str
    rest: str
    injected: bool

    @property
    def family(self) -> str:
        return next((key for key, names in FAMILIES.items() if self.name in names), "")

    def where(self) -> str:
        """Return the paths without what differs from run to run."""
        return " -> ".join(normal(path) for path in self.paths)

    def __str__(self) -> str:
        return f"{self.name} #{self.count} {self.where()}"


def normal(path: str) -> str:
    """Return a path without its random and time-dependent parts."""
    return _TEMPORARY.sub(r"\1\2-*", _STAMP.sub("-*", _IDENTITY.sub("/*", path)))


def parse(log: Path) -> list[Call]:
    """Parse all calls of a log written with the options of :func:`attached`."""
    counts: Counter[tuple[str | None, str]] = Counter()
    calls = []
    for line in log.read_text().splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            if not _OTHER.fullmatch(line):
                raise ValueError(f"strace wrote what this does not read: {line[:200]}")
            continue
        pid, name, arguments, result = match.groups()
        counts[pid, name] += 1
        calls.append(_call(int(pid or 0), name, counts[pid, name], arguments, result))
    return calls


def _call(pid: int, name: str, count: int, arguments: str, result: str) -> Call:
    paths: list[str] = []
    data = b""
    base = ""
    for match in _TOKEN.finditer(arguments):
        text, cut, of_descriptor = match.groups()
        if cut:
            raise ValueError(f"strace cut an argument of {name} short")
        if of_descriptor is not None:
            base = _decode(of_descriptor).decode()
            # The directory of a relative path is not a path of the call.
            if not arguments[match.end() :].startswith(', "') or name in FAMILIES["write"]:
                paths.append(base)
        elif name in FAMILIES["write"]:
            data += _decode(text)
        else:
            paths.append(os.path.join(base, _decode(text).decode()))
    number = re.match(r"-?\d+", result)
    error = re.search(r"-1 (E\w+)", result)
    return Call(
        pid,
        name,
        count,
        tuple(paths),
        data,
        None if error or number is None else int(number[0]),
        error[1] if error else "",
        _TOKEN.sub("", arguments),
        "(INJECTED)" in result,
    )


def _decode(text: str) -> bytes:
    if "\\x" not in text:
        return text.encode()
    return bytes.fromhex(text.replace("\\x", ""))


def injection(call: Call, mode: str) -> str:
    """Return strace's expression to inject a fault at a call."""
    return f"{call.name}:{_INJECTED[mode].format(call.count)}"


def hit(log: Path, mode: str) -> list[Call]:
    """Return the calls that were hit; only the first one where all later calls fail, too."""
    calls = parse(log)
    if mode == KILL:
        return calls[-1:] if log.read_text().endswith("+++ killed by SIGKILL +++\n") else []
    injected = [call for call in calls if call.injected]
    return injected[:1] if mode == FULL else injected


def inside(calls: Iterable[Call], root: Path) -> list[Call]:
    """Return the calls on paths in a directory, including the directory itself."""
    beginning = f"{root}/"
    return [
        call
        for call in calls
        if call.family and any((path + "/").startswith(beginning) for path in call.paths)
    ]


@contextlib.contextmanager
def attached(
    pid: int,
    log: Path,
    inject: str = "",
    *,
    threads: bool = True,
    also: Sequence[str] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """Attach strace to a process that has stopped itself; it continues once strace is attached.

    strace counts per process (and thread) from here on, so ``when=N`` is the N-th call of what
    follows and of nothing before.
    """
    wanted = ",".join(f"?{name}" for name in (*TRACED, *also))
    command = ["strace", "-p", str(pid), "-o", str(log), "-y", "-xx", "-s", str(1 << 26)]
    # Attached to one thread strace leaves out the number that it writes for several.
    command += ["-f"] if threads else []
    command += ["-e", f"trace={wanted}"]
    command += ["-e", f"inject={inject}"] if inject else []
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        printed = _line(tracer)
        if b"attached" not in printed:
            os.kill(pid, signal.SIGKILL)  # no other process would continue it
            raise CannotTrace(printed.decode(errors="replace").strip())
        os.kill(pid, signal.SIGCONT)
        yield tracer
        tracer.wait(PATIENCE)
    finally:
        tracer.kill()
        tracer.communicate()


class CannotTrace(Exception):
    """strace is missing or may not attach."""


def _line(tracer: subprocess.Popen[bytes]) -> bytes:
    """Return its first line; empty if it ended or printed nothing in time."""
    assert tracer.stderr is not None
    printed, limit = b"", time.monotonic() + PATIENCE
    while not printed.endswith(b"\n"):
        ready, _, _ = select.select([tracer.stderr], [], [], max(0.0, limit - time.monotonic()))
        more = os.read(tracer.stderr.fileno(), 4096) if ready else b""
        if not more:
            break
        printed += more
    return printed


def have_strace() -> bool:
    return shutil.which("strace") is not None
