"""``elastic-ckpt systemd install`` and ``uninstall``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from elastic_ckpt.cli.systemd.units import (
    UNIT,
    UnitFile,
    hidden_by,
    packaged_unit,
    program_directory,
    system_files,
    user_files,
    user_home,
)
from elastic_ckpt.errors import UnitsRefused
from elastic_ckpt.jobdir.run_command import quoted

_ANSWER_SECONDS: Final = 10.0
_HERE: Final = Path("/")

_user_option = click.option("--user", is_flag=True, help="For this user's own service manager.")
_force_option = click.option("--force", is_flag=True, help="Also files that were changed by hand.")
_root_option = click.option(
    "--root",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=_HERE,
    help="Below this directory, for an image of a machine.",
)


@click.group("systemd")
def command() -> None:
    """Install the units that run a job as a service.

    \b
      elastic-ckpt systemd install
      elastic-ckpt systemd install --user
      elastic-ckpt systemd uninstall
    """


@command.command("install")
@_user_option
@_force_option
@_root_option
@click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
def install(user: bool, force: bool, root: Path, dry_run: bool) -> int:
    """Install the units, and show what to type next.

    \b
      elastic-ckpt systemd install
      elastic-ckpt systemd install --user
      elastic-ckpt systemd install --root /mnt/image

    The unit elastic-ckpt@NAME runs the job file /etc/elastic-ckpt/NAME.toml with the command of
    this installation; with --user it is ~/.config/elastic-ckpt/NAME.toml. The units
    of another version, newer or older, are replaced. A file that was changed by hand
    is left as it is, and nothing is written.

    Exits with 0, with 73 if a file was changed or cannot be written.
    """
    programs = program_directory()
    wanted = _files(user, root, programs)
    packaged = None if user else packaged_unit(root)
    if packaged is not None and not force:
        raise UnitsRefused(
            f"a package has installed {packaged}: use that one, or --force for one that hides it"
        )
    _refuse_changed(wanted, "overwrites", force=force)
    if not user and root == _HERE and (hidden := hidden_by(programs)):
        click.echo(
            f"elastic-ckpt: other users may not pass {hidden}: install elastic-ckpt where the "
            "user of the jobs can read it, for example in /opt/elastic-ckpt",
            err=True,
        )
    for file in wanted:
        if file.found == file.data:
            click.echo(f"{file.path} is up to date")
            continue
        verb = "replace" if file.found is not None else "write"
        if not dry_run:
            _write(file)
        click.echo(f"would {verb} {file.path}" if dry_run else f"{verb.rstrip('e')}es {file.path}")
    if not dry_run:
        _show_next(_after_user_install() if user else _after_install(root))
    return 0


@command.command("uninstall")
@_user_option
@_force_option
@_root_option
def uninstall(user: bool, force: bool, root: Path) -> int:
    """Remove the units; job files, jobs and checkpoints stay.

    \b
      elastic-ckpt systemd uninstall
      elastic-ckpt systemd uninstall --user

    Exits with 0, with 73 if a job runs as a service, or a file was changed by hand.
    """
    wanted = _files(user, root, Path("/opt/elastic-ckpt/bin"))
    running = _running(user) if root == _HERE else []
    if running and not force:
        stop = " ".join([*_systemctl(user), "stop", *running])
        raise UnitsRefused(f"{', '.join(running)} runs: save and stop it first: {stop}")
    _refuse_changed(wanted, "removes", force=force)
    present = [file for file in wanted if file.found is not None]
    for file in present:
        file.path.unlink()
        click.echo(f"removed {file.path}")
    if not present:
        click.echo("the units are not installed")
        return 0
    enabled = sorted(
        link.name
        for file in present
        for link in file.path.parent.glob("*.wants/elastic-ckpt@*.service")
    )
    after = [f"rm {quoted(str(present[0].path.parent))}/*.wants/{name}" for name in enabled]
    if root == _HERE:
        after.append(" ".join([*_systemctl(user), "daemon-reload"]))
    _show_next(after)
    return 0


def _files(user: bool, root: Path, programs: Path) -> list[UnitFile]:
    if user and root != _HERE:
        raise click.UsageError("--root is for the system's units: leave out --user")
    return user_files(programs) if user else system_files(root, programs)


def _refuse_changed(files: Sequence[UnitFile], what: str, *, force: bool) -> None:
    changed = [str(file.path) for file in files if file.is_changed]
    if changed and not force:
        raise UnitsRefused(
            f"changed since installed: {', '.join(changed)}; keep changes in a drop-in (systemctl "
            f"edit {UNIT.partition('.')[0]}); --force {what} the file"
        )


def _write(file: UnitFile) -> None:
    """Replace a unit in one step, readable by everybody as units are."""
    temporary = file.path.with_name(f".tmp-{file.path.name}")
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(file.data)
        temporary.chmod(0o644)
        temporary.replace(file.path)
    except PermissionError:
        raise UnitsRefused(
            f"may not write {file.path}: run it as root, or with --user for your own services"
        ) from None


def _running(user: bool) -> list[str]:
    """Return the instances that run; nothing if no systemd answers."""
    ask = [*_systemctl(user), "list-units", "--plain", "--no-legend", "--full"]
    ask += ["--state=active,activating,deactivating,reloading", "elastic-ckpt@*.service"]
    try:
        done = subprocess.run(
            ask, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]


def _systemctl(user: bool) -> list[str]:
    return ["systemctl", "--user"] if user else ["systemctl"]


def _after_install(root: Path) -> list[str]:
    if root != _HERE:
        below = quoted(str(root))
        return [f"systemd-sysusers --root={below}", f"systemd-tmpfiles --root={below} --create"]
    return [
        "systemd-sysusers elastic-ckpt.conf",
        "systemd-tmpfiles --create elastic-ckpt.conf",
        "systemctl daemon-reload",
        "editor /etc/elastic-ckpt/NAME.toml",
        "elastic-ckpt doctor --unit NAME",
        "systemctl enable --now elastic-ckpt@NAME",
    ]


def _after_user_install() -> list[str]:
    jobs = quoted(str(user_home() / "elastic-ckpt"))
    return [
        f"loginctl enable-linger {quoted(os.environ.get('USER', ''))}".rstrip(" '"),
        "systemctl --user daemon-reload",
        f"mkdir -p {jobs} && editor {jobs}/NAME.toml",
        "systemctl --user enable --now elastic-ckpt@NAME",
    ]


def _show_next(commands: Sequence[str]) -> None:
    if commands:
        click.echo("next:")
    for line in commands:
        click.echo(f"  {line}")
