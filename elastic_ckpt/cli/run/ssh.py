"""The other hosts of a hostfile: the same ``run`` on each of them, started over ssh."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from elastic_ckpt.cli.run.hostfile import FILLED
from elastic_ckpt.errors import HostsNotStarted
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import create_file
from elastic_ckpt.util.text import printable

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.settings import RunSettings

CONNECT_SECONDS: Final = 10
START_SECONDS: Final = 30.0
"""How long ssh may take in all; what it starts does not hold it."""

_AT_ONCE: Final = 32

_ITS_OWN: Final = frozenset({"hostfile", "nnodes", "rdzv_endpoint", "node_name"})

_NOT_SENT = re.compile(
    r"(?:SSH|XDG|DBUS|SLURM|BASH|SYSTEMD|NOTIFY|WATCHDOG|LISTEN|JOURNAL|CREDENTIALS)\w*"
    r"|_|HOME|USER|LOGNAME|SHELL|PWD|OLDPWD|SHLVL|HOST|HOSTNAME|TERM|DISPLAY|MAIL|TMPDIR"
    r"|INVOCATION_ID|MAINPID|SHELLOPTS|E?UID|PPID"
)
"""Variables that are of this host, this login, or the unit that runs here."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def start_hosts(
    hosts: Sequence[str],
    context: click.Context,
    settings: RunSettings,
    say: Callable[[str], None],
) -> None:
    """Start ``run`` on these hosts, with the options of this one; bounded.

    Hosts that cannot be started are named, and done without if the job may begin with the others.

    Raises:
        HostsNotStarted: it may not.
        DirectoryUnusable, OSError: there is no place for what they print.
    """
    logs = _make_logs(JobDirectory(settings.directory), hosts)
    options = same_options(context)
    least, most = settings.nodes

    def start(host: str) -> str:
        own = [f"--nnodes={least}:{most}", f"--rdzv-endpoint={settings.endpoint}"]
        own.append(f"--node-name={host}")
        behind = ["--", str(context.params["script"]), *settings.args]
        line = shell_line(Path.cwd(), logs / f"{host}.log", [*options, *own, *behind])
        wrong = _call_ssh(host, line)
        return wrong and f"{host} was not started: {wrong} (its log: {logs / f'{host}.log'})"

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        failures = dict(zip(hosts, pool.map(start, hosts), strict=True))
    started = [host for host in hosts if not failures[host]]
    failed = [failures[host] for host in hosts if failures[host]]
    if 1 + len(started) < least:
        wait = f"{settings.gather_seconds:.0f} s"
        rest = f"; {', '.join(started)} will give up after {wait}" if started else ""
        raise HostsNotStarted(f"{'; '.join(failed)}{rest}: mend that and run again")
    for failure in failed:
        say(failure)
    if started:
        say(f"started {', '.join(started)} over ssh; what they print is in {logs}")


def same_options(context: click.Context) -> list[str]:
    """The options of this call, from wherever they came, as flags for another host."""
    filled = context.meta.get(FILLED, ())
    found: list[str] = []
    for option in context.command.params:
        name = option.name or ""
        value = context.params.get(name)
        given = context.get_parameter_source(name) is not ParameterSource.DEFAULT or name in filled
        if not isinstance(option, click.Option) or name in _ITS_OWN or not given or value is None:
            continue
        flag = option.opts[0]
        if option.is_flag:
            found += [flag] if value else []
        else:
            found += [f"{flag}={item}" for item in (value if option.multiple else [value])]
    return found


def shell_line(directory: Path, log: Path, arguments: Sequence[str]) -> str:
    """What a host's shell is to do: read the environment, start ``run``, and leave at once."""
    python, place = shlex.quote(sys.executable), shlex.quote(str(directory))
    run = shlex.join([sys.executable, "-m", "elastic_ckpt", "run", *arguments])
    script = (
        f'eval "$(cat)"; cd {place} || exit; '
        f"[ -x {python} ] || {{ echo no {python} there >&2; exit 127; }}; "
        f"exec </dev/null >>{shlex.quote(str(log))} 2>&1; setsid {run} &"
    )
    return f"exec sh -c {shlex.quote(script)}"  # whatever the login shell is


def exports(environ: Mapping[str, str] = os.environ) -> str:
    """This environment as a shell would set it, but for what is this host's own.

    It goes through ssh's standard input: an argument could be read by everybody on either host.
    """
    return "".join(
        f"export {name}={shlex.quote(value)}\n"
        for name, value in environ.items()
        if _VARIABLE.fullmatch(name) and not _NOT_SENT.fullmatch(name)
    )


def _call_ssh(host: str, line: str) -> str:
    """Why it failed; empty if it did not."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    try:
        done = subprocess.run(
            ["ssh", *options, host, line],
            input=exports(), capture_output=True, text=True, errors="replace",
            timeout=START_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"ssh did not end within {START_SECONDS:.0f} s"
    except OSError as error:
        return f"ssh: {error.strerror or error}"
    if done.returncode == 0:
        return ""
    said = printable(" ".join(done.stderr.split()), 300)
    return f"ssh ended with {done.returncode}{f': {said}' if said else ''}"


def _make_logs(job: JobDirectory, hosts: Sequence[str]) -> Path:
    """The directory of what they print; a file each, with the mode of the job's other files."""
    place = job.control / "hosts"
    job.require(place)
    for host in hosts:
        with contextlib.suppress(FileExistsError):
            os.close(create_file(place / f"{host}.log"))
    return place
