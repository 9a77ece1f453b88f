"""Is the systemd unit of a job as it must be? By what systemd has read, drop-ins included."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.errors import UsageError

JOB_FILES: Final = Path("/etc/elastic-ckpt")
_ANSWER_SECONDS: Final = 10.0

_MUST: Final[Mapping[str, tuple[str, str]]] = {
    "Type": ("notify", "systemd would take a job that loads for one that trains"),
    "KillMode": ("mixed", "workers would be signalled, too, and the save with them"),
    "OOMPolicy": ("continue", "one worker out of memory would end the job"),
    "SuccessExitStatus": ("75 76", "a preemption would count as a failure"),
    "RestartForceExitStatus": ("75 76", "a preempted job would not go on"),
    "RestartPreventExitStatus": ("64 65 70 73", "what cannot work would be tried again and again"),
    "PrivateDevices": ("no", "there would be no GPUs"),
    "ProtectClock": ("no", "there would be no GPUs"),
    "MemoryDenyWriteExecute": ("no", "compiled kernels would not run"),
    "RemoveIPC": ("no", "the memory tier would go between two starts"),
}
"""What each property must be, and what happens otherwise."""


def check_unit(name: str) -> Iterator[Finding]:
    """Findings about ``elastic-ckpt@NAME`` and its job file."""
    unit = f"elastic-ckpt@{name}.service"
    shown = _show(unit)
    if shown is None:
        todo = "run it on the machine that the job is to run on"
        yield Finding(unit, "problem", "systemd does not answer here", todo)
        return
    if shown.get("LoadState") != "loaded":
        todo = "copy systemd/elastic-ckpt@.service to /etc/systemd/system, then daemon-reload"
        yield Finding(unit, "problem", "is not installed", todo)
        return
    yield from _compare(unit, shown)
    yield from _check_file(JOB_FILES / f"{name}.toml", shown)


def _show(unit: str) -> dict[str, str] | None:
    names = [*_MUST, "LoadState", "WatchdogUSec", "User", "NeedDaemonReload"]
    command = ["systemctl", "show", unit, *(f"--property={name}" for name in names)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _compare(unit: str, shown: Mapping[str, str]) -> Iterator[Finding]:
    wrong = False
    for name, (wanted, why) in _MUST.items():
        found = shown.get(name, "")
        if found.split() != wanted.split():
            wrong = True
            todo = f"set {name}={wanted}: {why}"
            yield Finding(unit, "problem", f"{name} is {found or 'not set'}", todo)
    if shown.get("NeedDaemonReload") == "yes":
        wrong = True
        yield Finding(unit, "warning", "was changed since it was read", "systemctl daemon-reload")
    if shown.get("WatchdogUSec", "0") in ("0", "infinity"):
        wrong = True
        todo = "set WatchdogSec=5min: nobody would notice a supervisor that hangs"
        yield Finding(unit, "warning", "has no watchdog", todo)
    if not wrong:
        yield ok(unit, "is as it must be")


def _check_file(path: Path, shown: Mapping[str, str]) -> Iterator[Finding]:
    from elastic_ckpt.cli.run.command import settings_of

    try:
        settings = settings_of(["--config", str(path)])
    except UsageError as error:
        yield Finding(str(path), "problem", str(error), "elastic-ckpt run --help names all keys")
        return
    yield ok(str(path), "is a job file")
    user = shown.get("User") or "root"
    for where, want in ((settings.directory, os.W_OK), (settings.script, os.R_OK)):
        if not _may(user, _nearest(where), want):
            todo = f"give it to {user}, or change its permissions or User="
            doing = "write" if want == os.W_OK else "read"
            yield Finding(str(where), "problem", f"{user} may not {doing} there", todo)


def _nearest(path: Path) -> Path:
    """It, or what is there above it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _may(user: str, path: Path, want: int) -> bool:
    """Whether a user may, by owner and mode; lists that say more are not looked at."""
    import grp
    import pwd

    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return False
    found = path.stat()
    groups = {entry.pw_gid, *(one.gr_gid for one in grp.getgrall() if user in one.gr_mem)}
    if entry.pw_uid == 0:
        return True
    shift = 6 if found.st_uid == entry.pw_uid else 3 if found.st_gid in groups else 0
    return bool(stat.S_IMODE(found.st_mode) >> shift & want)
