"""``elastic-ckpt run``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elastic_ckpt.cli.run.hostfile import HOSTS, fill_in, hosts_to_start
from elastic_ckpt.cli.run.job_file import config_option, print_config_option, shown
from elastic_ckpt.cli.run.options import (
    known_grace,
    make_retention,
    notice_options,
    retention_options,
)
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir import node_record as records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.notices.platforms import choose
from elastic_ckpt.notices.signals import hold_signals
from elastic_ckpt.policy.hang import MIN_HANG_SECONDS
from elastic_ckpt.policy.interval import DEFAULT_MTBF_SECONDS, SaveInterval, parse_interval
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import parse_duration

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.settings import OnWarning, RunSettings
    from elastic_ckpt.supervisor.supervisor import Supervisor

_CALLED_WITH = "elastic_ckpt.called_with"
_COLOSSALAI_MODULES = ("colossalai", "colossalai.booster", "colossalai.booster.plugin")


class _Run(click.Command):
    """Remembers what it was called with: a reload reads the file again behind the same flags."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does."""
        ctx.meta[_CALLED_WITH] = list(args)
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:  # a shell that completes must not see what is wrong yet
            fill_in(ctx)
        return rest


@click.command("run", cls=_Run)
@config_option
@click.option(
    "--dir",
    "directory",
    envvar="ELASTIC_CKPT_DIR",
    required=True,
    type=click.Path(path_type=Path, readable=False),  # or it would be a wrong call
    help="The job directory, for checkpoints.",
)
@click.option("--name", help="The job's name; the directory's name if not given.")
@click.option(
    "--nproc",
    default="auto",
    show_default=True,
    help="Workers on this node: a number, or auto for one per GPU (one without).",
)
@click.option(
    "--nnodes",
    metavar="MIN[:MAX]",
    help="Nodes that the job takes; it goes on with MIN, and grows to MAX when they come.  "
    "[default: 1, the hostfile's, or those of SLURM's step]",
)
@click.option(
    "--hostfile",
    metavar="FILE",
    type=click.Path(path_type=Path, readable=False),
    help="The job's hosts, one a line, or HOST slots=NPROC. The first one leads, and starts the "
    "others over ssh.",
)
@click.option(
    "--rdzv-endpoint",
    metavar="HOST[:PORT]",
    help="Where the nodes meet, the same on each; the one whose address it is leads.  "
    "[default: the hostfile's or SLURM's first]",
)
@click.option(
    "--rdzv-timeout",
    metavar="SECONDS",
    default=600.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Seconds to wait for MIN nodes, or for the leading one; then the run ends with 75 or 76.",
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    help="Seconds from a signal to the end of this node.  [default: 30, or what SLURM leaves]",
)
@notice_options
@click.option(
    "--save-interval",
    metavar="STEPS|SECONDSs|auto",
    help="Save every so many steps (100) or seconds (90s), or as often as pays; goes before the "
    "script's.",
)
@click.option(
    "--mtbf",
    metavar="DURATION",
    help="Time between two failures to expect (6h30m); for --save-interval auto, which then counts "
    "those that come.  [default: 6h]",
)
@click.option(
    "--max-failures",
    metavar="N",
    default=3,
    show_default=True,
    type=click.IntRange(min=0),
    help="Failures in a row that are retried.",
)
@click.option(
    "--hang-seconds",
    metavar="SECONDS",
    default=MIN_HANG_SECONDS,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Silence of all workers within a step that is a hang at the least; ten times the longest "
    "of the job's own where that is more.",
)
@click.option(
    "--global-batch",
    type=click.IntRange(min=1),
    metavar="SAMPLES",
    help="Samples of one optimizer step on all workers together, whatever their number: "
    "accumulation follows.  [default: the script's accumulation]",
)
@click.option(
    "--preload",
    metavar="MODULE,...",
    help="Modules that workers find already imported.  [default: those that the job was seen to "
    "import, and ColossalAI's if the script imports it]",
)
@retention_options
@click.option(
    "--memory-dir",
    metavar="DIR|off",
    default="/dev/shm",
    show_default=True,
    help="Where checkpoints are first written, at the speed of memory; off writes to --dir.",
)
@click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    help="Serve metrics for Prometheus there, on 127.0.0.1 if no host is given; port 0 for any "
    "that is free.",
)
@click.option(
    "--metrics-file",
    metavar="FILE",
    type=click.Path(path_type=Path, readable=False),
    help="Write them to FILE, too, for node_exporter's textfile collector; it ends in .prom.",
)
@click.option("--group-access", is_flag=True, help="Let the group read the job directory.")
@click.option("--node-name", help="This node's name; SLURMD_NODENAME or the host's if not given.")
@print_config_option
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(
    context: click.Context, /, print_config: bool, hostfile: Path | None, **options: Any
) -> int:
    """Run SCRIPT on this node's workers and keep it alive.

    \b
      elastic-ckpt run --dir ckpt --nproc 2 -- train.py --epochs 3
      elastic-ckpt run --dir ckpt --grace 120 --save-interval 600s -- train.py
      elastic-ckpt run --config job.toml --print-config
      elastic-ckpt run --dir ckpt --nnodes 2:8 --rdzv-endpoint node0 -- train.py
      elastic-ckpt run --dir /shared/ckpt --hostfile hosts -- train.py

    \b
    Exit codes:
      0   finished
      75  preempted, with a sealed checkpoint: run me again
      76  preempted without a new one: run me again
      70  failure budget spent, or no retry would mend it
      65  no valid checkpoint, or the data does not match
      73  the directory is locked or unusable
      64  wrong usage
    """
    if print_config:
        click.echo(shown(context))
        return 0
    _open_standard_streams()
    hold_signals()
    settings = _settings(**options)
    _remember_slurm_job(settings)
    supervisor = _supervisor(settings, lambda: settings_of(context.meta[_CALLED_WITH]))
    if hostfile is not None:  # now that the job is this run's
        _start_others(context, settings)
    return int(supervisor.run())


def _settings(
    *,
    directory: Path,
    name: str | None,
    nproc: str,
    nnodes: str | None,
    rdzv_endpoint: str | None,
    rdzv_timeout: float,
    grace: float | None,
    notice_source: tuple[str, ...],
    notice_file: Path | None,
    on_warning: OnWarning,
    acknowledge: bool,
    save_interval: str | None,
    mtbf: str | None,
    max_failures: int,
    hang_seconds: float,
    global_batch: int | None,
    preload: str | None,
    keep_last: int,
    keep_every: int,
    keep_best: str | None,
    memory_dir: str,
    metrics: str | None,
    metrics_file: Path | None,
    group_access: bool,
    node_name: str | None,
    script: Path,
    args: tuple[str, ...],
) -> RunSettings:
    """What was asked for; the names are those of the options."""
    from elastic_ckpt.supervisor.metrics.exporter import check_file, parse_address
    from elastic_ckpt.supervisor.settings import RunSettings

    check_script(script)
    platforms = choose(notice_source)
    grace = known_grace(grace, platforms)
    interval = parse_interval(save_interval) if save_interval else SaveInterval()
    nodes, endpoint = _nodes(nnodes, rdzv_endpoint, platforms)
    root = JobDirectory.at(directory).root
    return RunSettings(
        directory=root,
        script=script.resolve(),
        args=args,
        name=name or root.name,
        node=records.node_name(node_name),
        nproc=_workers(nproc),
        grace=grace,
        interval=interval,
        mtbf=_mtbf(mtbf, interval),
        max_failures=max_failures,
        hang_seconds=hang_seconds,
        global_batch=global_batch or 0,
        preload=_preload(preload, script),
        learn_preload=preload is None,
        retention=make_retention(keep_last, keep_every, keep_best),
        group_access=group_access,
        memory=None if memory_dir == "off" or endpoint else Path(memory_dir).absolute(),
        nodes=nodes,
        endpoint=endpoint,
        gather_seconds=rdzv_timeout,
        notice_sources=platforms,
        notice_file=notice_file.absolute() if notice_file else None,
        on_warning=on_warning,
        acknowledge=acknowledge,
        metrics=None if metrics is None else parse_address(metrics),
        metrics_file=None if metrics_file is None else check_file(metrics_file),
    )


def parse(called_with: Sequence[str]) -> dict[str, Any]:
    """The options by name that ``elastic-ckpt run`` would have with these arguments.

    Raises:
        UsageError: something is wrong with them, or with the job file that they name.
    """
    try:
        with command.make_context("run", list(called_with)) as context:
            options = dict(context.params)
    except click.ClickException as error:
        raise UsageError(error.format_message()) from None
    for name in ("print_config", "hostfile"):  # what the file says is in the others by now
        options.pop(name)
    return options


def settings_of(called_with: Sequence[str]) -> RunSettings:
    """What ``elastic-ckpt run`` would do with these arguments.

    Raises:
        UsageError: as :func:`parse`; or a path is none.
    """
    try:
        return _settings(**parse(called_with))
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a link to itself, no such user
        raise UsageError(printable(str(error))) from None


def _supervisor(settings: RunSettings, reread: Callable[[], RunSettings]) -> Supervisor:
    """Of a node that is alone, leads, or follows."""
    from elastic_ckpt.checkpoint.job_lock import read_owner
    from elastic_ckpt.protocol.rendezvous import meet
    from elastic_ckpt.supervisor.cluster.head import Head
    from elastic_ckpt.supervisor.cluster.member import Member
    from elastic_ckpt.supervisor.supervisor import Supervisor

    if not settings.endpoint:
        return Supervisor(settings, _say, reread)
    lock = JobDirectory(settings.directory).lock

    def is_led() -> bool:
        found = read_owner(lock)
        return found is not None and found.owner.is_alive() is not False

    rendezvous = meet(settings.endpoint, is_led)
    return (Head if rendezvous.leads else Member)(settings, _say, reread, rendezvous)


def _start_others(context: click.Context, settings: RunSettings) -> None:
    """Start the hosts of the hostfile, if that is this one's to do."""
    hosts = hosts_to_start(context.meta[HOSTS], settings.node)
    if hosts:
        from elastic_ckpt.cli.run.ssh import start_hosts

        start_hosts(hosts, context, settings, _say)


def _remember_slurm_job(settings: RunSettings) -> None:
    """So that ``elastic-ckpt status JOBID`` finds it."""
    if "slurm" in settings.notice_sources:
        from elastic_ckpt.jobdir.slurm_jobs import remember_job
        from elastic_ckpt.notices.slurm import job_id

        for number in {job_id(), os.environ["SLURM_JOB_ID"]}:
            remember_job(number, settings.directory)


def _open_standard_streams() -> None:
    """Fill descriptors 0 to 2 where they are closed, before a lock or the board takes their place.

    Workers inherit them and print to them.
    """
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        os.set_inheritable(fd, True)
        fd = os.dup(fd)
    os.close(fd)


def _say(line: str) -> None:
    try:
        click.echo(f"elastic-ckpt: {printable(line, 4000)}", err=True)
    except OSError:
        # Nobody reads any more. What is still buffered must find a place to go at exit, or
        # Python would end with a code of its own.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)


def check_script(script: Path) -> None:
    """UsageError if it is not there, or cannot be read."""
    if not script.is_file():
        raise UsageError(f"there is no script {script}: give its path after --")
    if not os.access(script, os.R_OK):
        raise UsageError(f"{script} cannot be read: mend its permissions")


def _workers(nproc: str) -> int:
    if nproc == "auto":
        from elastic_ckpt.cli.gpus import auto_workers

        return auto_workers()
    if not nproc.isdecimal() or int(nproc) < 1:
        raise UsageError(f"--nproc {nproc!r} is neither a number from 1 nor auto")
    return int(nproc)


def _nodes(
    nnodes: str | None, endpoint: str | None, platforms: Sequence[str]
) -> tuple[tuple[int, int], str]:
    """The fewest and the most nodes, and where they meet; empty for a node that is alone."""
    from elastic_ckpt.protocol.rendezvous import parse_nodes

    in_slurm = "slurm" in platforms
    if nnodes is None:
        nnodes = os.environ.get("SLURM_STEP_NUM_NODES", "1") if in_slurm else "1"
    least, most = parse_nodes(nnodes)
    if most > 1 and not endpoint and in_slurm:
        from elastic_ckpt.notices.slurm import head_endpoint

        endpoint = head_endpoint()
    if most > 1 and not endpoint:
        raise UsageError(
            f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT, the same on each node: the "
            "address of one of them; or --hostfile FILE"
        )
    return (least, most), endpoint or ""


def _mtbf(given: str | None, interval: SaveInterval) -> float:
    if given is None:
        return DEFAULT_MTBF_SECONDS
    if not interval.auto:
        raise UsageError("--mtbf is for --save-interval auto: give both, or neither")
    try:
        seconds = parse_duration(given)
    except UsageError as error:
        raise UsageError(f"--mtbf {error}") from None
    if seconds <= 0:
        raise UsageError(f"--mtbf {given!r} is no time between failures")
    return seconds


def _preload(given: str | None, script: Path) -> tuple[str, ...]:
    if given is not None:
        return tuple(module.strip() for module in given.split(",") if module.strip())
    source = script.read_text(errors="replace")
    uses = re.search(r"^\s*(?:import|from)\s+colossalai\b", source, re.MULTILINE)
    return _COLOSSALAI_MODULES if uses else ()
