"""``elastic-ckpt run``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from elastic_ckpt.cli.run.build_settings import (
    build_settings,
    check_anywhere,
    missing_modules,
)
from elastic_ckpt.cli.run.ending import advised, after_run
from elastic_ckpt.cli.run.entry import ScriptPath, choose_entry, end_options, options_end
from elastic_ckpt.cli.run.hostfile import HOSTS, apply_hostfile, hosts_to_start
from elastic_ckpt.cli.run.import_wait import ImportStage, ImportWait
from elastic_ckpt.cli.run.interpreter import check_python
from elastic_ckpt.cli.run.job_file import format_options, job_file_named
from elastic_ckpt.cli.run.node_run import NodeRun
from elastic_ckpt.cli.run.options import grouped, run_options
from elastic_ckpt.cli.run.storage_check import check_bucket, check_storage
from elastic_ckpt.cli.run.worker_variables import ENV, VARIABLES
from elastic_ckpt.errors import LockHeld, UsageError
from elastic_ckpt.jobdir.answering import wait_for_answer
from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.notices.signals import hold_signals, is_held
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.util.journald import Line, marked, priority_of, warning
from elastic_ckpt.util.outlet import unblocked_streams
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.settings import RunSettings
    from elastic_ckpt.supervisor.supervisor import Supervisor

_ARGUMENTS = "elastic_ckpt.arguments"
_SYNTAX = 30  # the width of an option's syntax in the help, click's maximum


class _RunCommand(click.Command):
    """Keeps its arguments, so that a reload can parse them again with the changed job file."""

    allow_interspersed_args = False  # what stands after the script is the script's

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does up to the script or module, then apply the hostfile."""
        ctx.meta[_ARGUMENTS] = list(args)
        with job_file_named(ctx):
            return self._parse(ctx, args)

    def _parse(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            rest = super().parse_args(ctx, end_options(args, self.params))
        except click.MissingParameter as error:
            if error.param is not None and set(error.param.opts) & set(args):
                raise UsageError(f"{error.param.opts[0]} must stand before the script") from None
            raise
        if not ctx.resilient_parsing:  # shell completion must not fail on an incomplete line
            choose_entry(ctx)
            apply_hostfile(ctx)
        ctx.params[ENV] = ctx.meta.get(VARIABLES, {})
        return rest

    def make_context(
        self, info_name: str | None, args: list[str], *more: Any, **extra: Any
    ) -> click.Context:
        """Parse as click does; errors say what to do next."""
        with advised(None, str):
            return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run as click does; errors say what to do next."""
        given = ctx.params["directory"]
        place = given.absolute() if isinstance(given, Path) else given
        with advised(place, RunCommand.current(_arguments(ctx)).line), job_file_named(ctx):
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the options in groups, with the same columns in all of them."""
        for title, options in grouped(self.get_params(ctx)).items():
            records = [record for one in options if (record := one.get_help_record(ctx))]
            with formatter.section(title):
                formatter.write_dl([(syntax.ljust(_SYNTAX), text) for syntax, text in records])


@click.command("run", cls=_RunCommand)
@run_options
@click.argument("script", type=ScriptPath(), required=False, metavar="SCRIPT")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(
    context: click.Context, /, print_config: bool, hostfile: Path | None, **options: Any
) -> int:
    """Run SCRIPT on this node's workers and keep it alive.

    \b
      elastic-ckpt run --dir ckpt --nproc 2 train.py --epochs 3
      elastic-ckpt run --dir ckpt -m package.train --epochs 3
      elastic-ckpt run --dir ckpt --grace 120 --save-interval 600s -- train.py
      elastic-ckpt run --config job.toml --print-config
      elastic-ckpt run --dir ckpt --nnodes 2:8 --rdzv-endpoint node0 -- train.py
      elastic-ckpt run --dir /shared/ckpt --hostfile hosts -- train.py

    \b
    Exit codes:
      0   finished
      75  preempted, with a sealed checkpoint: rerun the same command
      76  preempted without a new one: rerun the same command
      70  failure budget spent, or a failure that a retry cannot fix
      65  no usable checkpoint, or the data does not match
      73  the directory is locked or unusable
      64  wrong usage
    """
    if print_config:
        click.echo(format_options(context))
        check_anywhere(**options)
        return 0
    _open_standard_streams()
    hold_signals()
    with unblocked_streams(_not_shown):
        if isinstance(options["directory"], Path):
            wait_for_answer(options["directory"], _print_line, is_held)
        settings = build_settings(**options)
        check_python(settings.python, settings.module)
        _remember_slurm_job(settings)
        problems = [check_storage(settings.directory), missing_modules(settings)]
        problems.append(_starts_again(settings))
        if settings.mirror is not None and not settings.mirror.is_place:
            problems.append(check_bucket(settings.directory, settings.mirror.url))
        hosts = _hosts(context, settings) if hostfile is not None else ()
        settings = replace(settings, started_others=bool(hosts))
        wait = ImportWait(settings.preload)

        def say(line: str) -> None:
            wait.clear()
            _print_line(_of_node(line, settings))

        node = NodeRun(settings, say, lambda: settings_of(context.meta[_ARGUMENTS]))
        try:
            supervisor = node.begin()
        except LockHeld as error:
            raise LockHeld(_slurm_holder(settings) or f"{error}{_several(settings)}") from None
        supervisor.record.node.command = _recorded(context, settings)
        _import_what_the_end_needs()
        for problem in filter(None, problems):
            supervisor.record.say(warning(problem))
        if hosts and supervisor.record.node.leads:  # not before this run owns the job
            _start_others(hosts, context, settings)
        if not settings.endpoint:  # on several nodes the import is part of the wait for them
            wait.begin(lambda: _import_stage(supervisor))
        try:
            code = int(supervisor.run())
        finally:
            wait.end()
        while supervisor.goes_on is not None:
            supervisor = node.go_on(supervisor)
            supervisor.record.node.command = _recorded(context, settings)
            code = int(supervisor.run())
        for line in after_run(settings.directory, supervisor.record.node, settings.nodes[0]):
            click.echo(printable(line, 200_000), err=True)
        return code


def _of_node(line: str, settings: RunSettings) -> str:
    """Return the line with this node's name where several nodes of SLURM share an output file."""
    if settings.nodes[1] == 1 or "slurm" not in settings.notice_sources:
        return line
    return Line(f"{settings.node}: {line}", priority_of(line))


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options of ``elastic-ckpt run`` with these arguments, by name.

    Raises:
        UsageError: the arguments, or the job file that they name, are invalid.
    """
    try:
        with command.make_context("run", list(arguments)) as context:
            options = dict(context.params)
    except click.ClickException as error:
        raise UsageError(error.format_message()) from None
    for name in ("print_config", "hostfile"):  # the hostfile is already applied to the others
        options.pop(name)
    return options


def settings_of(arguments: Sequence[str]) -> RunSettings:
    """Return the settings of ``elastic-ckpt run`` with these arguments.

    Raises:
        UsageError: as in :func:`parse`, or a path is unusable.
    """
    try:
        return build_settings(**parse(arguments))
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a link loop, no such user
        raise UsageError(printable(str(error))) from None


def _arguments(context: click.Context) -> list[str]:
    """Return the arguments of this run, with the directory if it is from the environment."""
    arguments: list[str] = context.meta[_ARGUMENTS]
    if context.get_parameter_source("directory") is ParameterSource.ENVIRONMENT:
        return ["--dir", str(context.params["directory"]), *arguments]
    return arguments


def _recorded(context: click.Context, settings: RunSettings) -> RunCommand:
    """Return the command of this run as its record has it, with the job's directory."""
    words = _arguments(context)
    own = options_end(words, context.command.params)
    is_place = settings.mirror is not None and settings.mirror.is_place
    place = "" if is_place else str(settings.directory)
    return RunCommand.current(words, settings.script, own=own, place=place)


def _starts_again(settings: RunSettings) -> str:
    """Return a line if a script is started again that has finished; empty if not."""
    own, records = settings.own, job_records(JobDirectory(settings.directory))
    if not own or own.finished_when or not records or records[0].state is not RunState.FINISHED:
        return ""
    return "the job has finished: this starts its script again, as --finished-when is not set"


def _import_stage(supervisor: Supervisor) -> ImportStage:
    if supervisor.agent is None:
        return ImportStage.YET_TO_BEGIN
    is_over = any(slot.pid for slot in supervisor.ports.board.read_slots())
    return ImportStage.OVER if is_over else ImportStage.IMPORTING


def _import_what_the_end_needs() -> None:
    """Import it now: the package may be upgraded or removed while the job runs."""
    importlib.import_module("elastic_ckpt.cli.status.view")


def _hosts(context: click.Context, settings: RunSettings) -> tuple[str, ...]:
    """Return the hosts of the hostfile that this command starts."""
    return hosts_to_start(context.meta[HOSTS], settings.node)


def _start_others(hosts: Sequence[str], context: click.Context, settings: RunSettings) -> None:
    from elastic_ckpt.cli.run.ssh import start_hosts

    start_hosts(hosts, context, settings, _print_line)


def _remember_slurm_job(settings: RunSettings) -> None:
    """Record the SLURM job's directory, for ``elastic-ckpt status JOBID``."""
    if "slurm" in settings.notice_sources:
        from elastic_ckpt.jobdir.slurm_jobs import SlurmJob, find_job, remember_job
        from elastic_ckpt.notices.slurm import job_id

        number = job_id()
        job = find_job(number)
        if job is None or job.directory != settings.directory:
            job = SlurmJob(settings.directory)
            remember_job(number, job)
        if os.environ["SLURM_JOB_ID"] != number.partition("_")[0]:
            remember_job(os.environ["SLURM_JOB_ID"], job)  # a task's own number


def _slurm_holder(settings: RunSettings) -> str:
    """Return what this SLURM job cannot do as another one runs in its directory; else empty."""
    if "slurm" not in settings.notice_sources:
        return ""
    from elastic_ckpt.jobdir.node_record import job_records
    from elastic_ckpt.jobdir.paths import JobDirectory
    from elastic_ckpt.notices.slurm import job_id
    from elastic_ckpt.protocol.run_state import TERMINAL

    for record in job_records(JobDirectory(settings.directory)):
        other = record.command.slurm_job if record.command and record.state not in TERMINAL else ""
        if other and other != job_id():
            return (
                f"SLURM job {other} runs in {settings.directory}: wait for its end, or scancel "
                f"{other}, then submit this job again"
            )
    return ""


def _several(settings: RunSettings) -> str:
    """Return a hint if srun has started several supervisors on this node; empty if not."""
    if "slurm" in settings.notice_sources:
        from elastic_ckpt.notices.slurm import tasks_per_node

        if (count := tasks_per_node()) > 1:
            return (
                f"; srun started {count} supervisors on this node: use srun --ntasks-per-node=1, "
                "since each starts its node's workers (--nproc)"
            )
    return ""


def _open_standard_streams() -> None:
    """Open /dev/null on those of descriptors 0 to 2 that are closed.

    Workers inherit them and print to them, so no lock or board may get these numbers.
    """
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        os.set_inheritable(fd, True)
        fd = os.dup(fd)
    os.close(fd)


def _print_line(line: str) -> None:
    shown = f"elastic-ckpt: {printable(line, 4000)}"
    click.echo(marked(shown, priority_of(line)), err=True)


def _not_shown(count: int) -> str:
    return (
        f"elastic-ckpt: {human_bytes(count)} of the supervisor's lines were not shown here, "
        "because nothing read them; the journal and the logs have them"
    )
