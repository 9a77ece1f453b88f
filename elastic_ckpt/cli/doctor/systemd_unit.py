"""Check a job's systemd unit as systemd loaded it, including drop-ins."""

from __future__ import annotations

import getpass
import os
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.cli.run.interpreter import check_python
from elastic_ckpt.cli.systemd.units import UNIT, user_home
from elastic_ckpt.errors import UsageError

JOB_FILES: Final = Path("/etc/elastic-ckpt")
_ANSWER_SECONDS: Final = 10.0

_MUST: Final[Mapping[str, tuple[str, str]]] = {
    "Type": ("notify", "otherwise a job that is still loading counts as started"),
    "KillMode": ("mixed", "otherwise workers are signalled during the save"),
    "OOMPolicy": ("continue", "otherwise one worker out of memory ends the job"),
    "SuccessExitStatus": ("75 76", "otherwise a preemption counts as a failure"),
    "RestartForceExitStatus": ("75 76", "otherwise a preempted job is not restarted"),
    "RestartPreventExitStatus": ("64 65 70 73", "otherwise permanent failures are retried forever"),
    "PrivateDevices": ("no", "otherwise GPUs are hidden"),
    "ProtectClock": ("no", "otherwise GPUs are hidden"),
    "MemoryDenyWriteExecute": ("no", "otherwise compiled kernels cannot run"),
    "RemoveIPC": ("no", "otherwise the memory tier is deleted between starts"),
}
"""The required value of each property, and the reason."""


def check_unit(name: str) -> Iterator[Finding]:
    """Check ``elastic-ckpt@NAME`` and its job file."""
    unit = f"elastic-ckpt@{name}.service"
    shown, jobs = _show(unit), JOB_FILES
    if os.geteuid() and (user_home() / "systemd/user" / UNIT).exists():
        shown, jobs = _show(unit, "--user"), user_home() / "elastic-ckpt"
    if shown is None:
        todo = "run doctor on the machine that runs the job"
        yield Finding(unit, "problem", "systemd does not answer", todo)
        return
    if shown.get("LoadState") != "loaded":
        todo = "elastic-ckpt systemd install, and what it says next"
        yield Finding(unit, "problem", "not installed", todo)
        return
    yield from _compare(unit, shown)
    yield from _check_file(jobs / f"{name}.toml", shown)


def _show(unit: str, *scope: str) -> dict[str, str] | None:
    names = [*_MUST, "LoadState", "WatchdogUSec", "User", "NeedDaemonReload"]
    command = ["systemctl", *scope, "show", unit, *(f"--property={name}" for name in names)]
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
        yield Finding(unit, "warning", "changed since systemd loaded it", "systemctl daemon-reload")
    if shown.get("WatchdogUSec", "0") in ("0", "infinity"):
        wrong = True
        todo = "set WatchdogSec=5min, to restart a supervisor that hangs"
        yield Finding(unit, "warning", "no watchdog", todo)
    if not wrong:
        yield ok(unit, "configured correctly")


def _check_file(path: Path, shown: Mapping[str, str]) -> Iterator[Finding]:
    from elastic_ckpt.cli.run.command import settings_of

    try:
        settings = settings_of(["--config", str(path)])
    except UsageError as error:
        yield Finding(str(path), "problem", str(error), "see elastic-ckpt run --help for the keys")
        return
    yield ok(str(path), "valid job file")
    try:
        check_python(settings.python, settings.module)
    except UsageError as error:
        yield Finding("python", "problem", str(error), "elastic-ckpt run would end with 64")
    user = shown.get("User") or getpass.getuser()
    for where, want in ((settings.directory, os.W_OK), (settings.script, os.R_OK)):
        if not _may(user, _nearest(where), want):
            todo = "change its owner or permissions, or User="
            doing = "write" if want == os.W_OK else "read"
            yield Finding(str(where), "problem", f"{user} cannot {doing} it", todo)


def _nearest(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _may(user: str, path: Path, want: int) -> bool:
    """Whether a user may access a path, by owner and mode; access lists are ignored."""
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
