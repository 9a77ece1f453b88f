"""Start the same ``run`` on the other hosts of a hostfile, over ssh."""

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

from elastic_ckpt.cli.run.entry import words
from elastic_ckpt.cli.run.hostfile import FROM_HOSTFILE
from elastic_ckpt.errors import HostsNotStarted
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import create_file
from elastic_ckpt.util.journald import warning
from elastic_ckpt.util.text import printable

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.settings import RunSettings

CONNECT_SECONDS: Final = 10
START_SECONDS: Final = 30.0
"""Limit for one ssh call; it returns as soon as ``run`` is started."""

_MAX_PARALLEL: Final = 32

_PER_HOST: Final = frozenset({"hostfile", "nnodes", "rdzv_endpoint", "node_name", "module"})

_NOT_SENT = re.compile(
    r"(?:SSH|XDG|DBUS|SLURM|BASH|SYSTEMD|NOTIFY|WATCHDOG|LISTEN|JOURNAL|CREDENTIALS)\w*"
    r"|_|HOME|USER|LOGNAME|SHELL|PWD|OLDPWD|SHLVL|HOST|HOSTNAME|TERM|DISPLAY|MAIL|TMPDIR"
    r"|INVOCATION_ID|MAINPID|SHELLOPTS|E?UID|PPID"
)
"""Variables that belong to this host, this login, or its systemd unit."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def start_hosts(
    hosts: Sequence[str],
    context: click.Context,
    settings: RunSettings,
    say: Callable[[str], None],
) -> None:
    """Start ``run`` on these hosts with the options of this one, within a bounded time.

    A host that fails is reported and left out if the job can start with the others.

    Raises:
        HostsNotStarted: too few hosts remain.
        DirectoryUnusable, OSError: cannot create the log files.
    """
    logs = _make_logs(JobDirectory(settings.directory), hosts)
    options = same_options(context)
    variables = exports(os.environ | dict(settings.env))
    least, most = settings.nodes

    def start(host: str) -> str:
        own = [f"--nnodes={least}:{most}", f"--rdzv-endpoint={settings.endpoint}"]
        own.append(f"--node-name={host}")
        command = ["--", *words(context.params)]
        arguments = [*options, *own, *command]
        log = logs / f"{host}.log"
        line = shell_line(Path.cwd(), log, arguments, makes=bool(settings.shared_url))
        error = _call_ssh(host, line, variables)
        return error and f"{host} was not started: {error} (log: {logs / f'{host}.log'})"

    with ThreadPoolExecutor(_MAX_PARALLEL) as pool:
        failures = dict(zip(hosts, pool.map(start, hosts), strict=True))
    started = [host for host in hosts if not failures[host]]
    failed = [failures[host] for host in hosts if failures[host]]
    if 1 + len(started) < least:
        wait = f"{settings.gather_seconds:.0f} s"
        rest = f"; {', '.join(started)} will give up after {wait}" if started else ""
        raise HostsNotStarted(f"{'; '.join(failed)}{rest}: fix this, then rerun the same command")
    for failure in failed:
        say(warning(failure))
    if started:
        say(f"started {', '.join(started)} over ssh; their output is in {logs}")


def same_options(context: click.Context) -> list[str]:
    """Return the options of this call, whatever their source, as flags for another host."""
    filled = context.meta.get(FROM_HOSTFILE, ())
    found: list[str] = []
    for option in context.command.params:
        name = option.name or ""
        value = context.params.get(name)
        given = context.get_parameter_source(name) is not ParameterSource.DEFAULT or name in filled
        if not isinstance(option, click.Option) or name in _PER_HOST or not given or value is None:
            continue
        flag = option.opts[0]
        if option.is_flag:
            found += [flag] if value else []
        else:
            found += [f"{flag}={item}" for item in (value if option.multiple else [value])]
    return found


def shell_line(directory: Path, log: Path, arguments: Sequence[str], *, makes: bool = False) -> str:
    """Return the command for a host's shell: read the environment, start ``run``, and exit.

    Args:
        makes: make the log's directory, which is not on a disk that the hosts share.
    """
    make = f"mkdir -m 700 -p {shlex.quote(str(log.parent))} || exit; " if makes else ""
    python, folder = shlex.quote(sys.executable), shlex.quote(str(directory))
    run = shlex.join([sys.executable, "-m", "elastic_ckpt", "run", *arguments])
    script = (
        f'eval "$(cat)"; cd {folder} || exit; {make}'
        f"[ -x {python} ] || {{ echo no {python} there >&2; exit 127; }}; "
        f"exec </dev/null >>{shlex.quote(str(log))} 2>&1; setsid {run} &"
    )
    return f"exec sh -c {shlex.quote(script)}"  # the login shell may not be POSIX


def exports(environ: Mapping[str, str] = os.environ) -> str:
    """Return this environment as shell commands, without the variables of this host.

    It goes through ssh's standard input, since any user of either host can read arguments.
    """
    return "".join(
        f"export {name}={shlex.quote(value)}\n"
        for name, value in environ.items()
        if _VARIABLE.fullmatch(name) and not _NOT_SENT.fullmatch(name)
    )


def _call_ssh(host: str, line: str, variables: str) -> str:
    """Run the line on the host; return the error, or an empty string."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    try:
        done = subprocess.run(
            ["ssh", *options, host, line],
            input=variables, capture_output=True, text=True, errors="replace",
            timeout=START_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"ssh did not finish within {START_SECONDS:.0f} s"
    except OSError as error:
        return f"ssh: {error.strerror or error}"
    if done.returncode == 0:
        return ""
    stderr = printable(" ".join(done.stderr.split()), 300)
    return f"ssh exited with {done.returncode}{f': {stderr}' if stderr else ''}"


def _make_logs(job: JobDirectory, hosts: Sequence[str]) -> Path:
    """Create a log file for each host, with the job's file mode; return their directory."""
    folder = job.control / "hosts"
    job.require(folder)
    for host in hosts:
        with contextlib.suppress(FileExistsError):
            os.close(create_file(folder / f"{host}.log"))
    return folder
