"""The options of ``run``, in the groups and the order of its help: the most used first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import click

from elastic_ckpt.cli.common import DirectoryOrUrl, Duration, Size
from elastic_ckpt.cli.run.job_file import read_job_file
from elastic_ckpt.notices.platforms import AUTO, source_names
from elastic_ckpt.policy.hang import MIN_HANG_SECONDS

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path, readable=False)  # readable: a later error has a better exit code


_COUNT = click.IntRange(min=0)


class GroupedOption(click.Option):
    """An option that the help shows under a heading, ``group``."""

    def __init__(self, *declarations: Any, group: str, **settings: Any) -> None:
        super().__init__(*declarations, **settings)
        self.group = group


class _Declared(NamedTuple):
    """An option's declarations and settings, as ``click.option`` takes them."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


def _option(syntax: str, text: str, *names: str, **settings: Any) -> _Declared:
    """Return the option with this syntax, ``--flag METAVAR``; help shows its default.

    Args:
        names: further flags, or the parameter's name.
    """
    flag, _, metavar = syntax.partition(" ")
    settings.setdefault("show_default", "default" in settings)
    settings |= {"metavar": metavar or None, "help": text}
    return _Declared((*names, flag) if names[:1] == ("-m",) else (flag, *names), settings)


def _complete_source(_: click.Context, __: click.Parameter, prefix: str) -> list[str]:
    return [name for name in source_names() if name.startswith(prefix)]


_RETENTION: Final = (
    _option("--keep-last N", "Keep the newest N.", default=0, show_default=False, type=_COUNT),
    _option(
        "--keep-every STEPS",
        "Keep the first checkpoint of every STEPS steps.",
        default=0,
        show_default=False,
        type=_COUNT,
    ),
    _option(
        "--keep-best N:METRIC[:max]",
        "Keep the N checkpoints with the lowest (or highest) reported value.",
    ),
)

_JOB: Final = (
    _option(
        "--dir",
        "The job directory, for checkpoints; or the URL of a bucket, which any machine "
        "continues from.",
        "directory",
        envvar="ELASTIC_CKPT_DIR",
        required=True,
        type=DirectoryOrUrl(),
    ),
    _option(
        "--nproc",
        "Workers on this node: a number, or auto for one per GPU (one without GPUs).",
        default="auto",
    ),
    _option(
        "--module MODULE",
        "Run a module in place of a script, as python -m does; options end here.",
        "-m",
    ),
    _option(
        "--python PATH",
        "The interpreter of the workers, for a supervisor in an environment of its own; it needs "
        "torch and the same version of elastic-ckpt.  [default: the supervisor's]",
    ),
    _option(
        "--config JOB.toml",
        "A file with options as keys; flags and environment override it.",
        type=_PATH,
        is_eager=True,
        expose_value=False,
        callback=lambda ctx, _, path: None if path is None else read_job_file(ctx, path),
    ),
    _option(
        "--print-config",
        "Print every option's value and source, without running.",
        is_flag=True,
    ),
    _option("--name", "The job's name.  [default: the directory's name]"),
    _option(
        "--from NAME",
        "Continue from this checkpoint, [SESSION/]epoch-N_step-M, and supersede newer ones. "
        "Once: a rerun of the same command continues from the newest.",
        "start_from",
    ),
    _option(
        "--global-batch SAMPLES",
        "Samples per optimizer step over all workers, at any number of workers: sets the "
        "accumulation, for a script that steps if session.step_ends.  [default: the script's "
        "accumulation]",
        type=click.IntRange(min=1),
    ),
    _option(
        "--preload MODULE,...",
        "Modules to import before workers start.  [default: torch, and ColossalAI if the script "
        "or its arguments name it]",
    ),
)

_NODES: Final = (
    _option(
        "--nnodes MIN[:MAX]",
        "Number of nodes: the job starts and continues with MIN, and grows to MAX as nodes join.  "
        "[default: 1, the hostfile's, or those of SLURM's step]",
    ),
    _option(
        "--rdzv-endpoint HOST[:PORT]",
        "Where the nodes meet, the same on every node; the node with this address leads.  "
        "[default: the hostfile's or SLURM's first]",
    ),
    _option(
        "--hostfile FILE",
        "The job's hosts, one per line: HOST or HOST slots=NPROC. The first one leads and starts "
        "the others over ssh.",
        type=_PATH,
    ),
    _option(
        "--rdzv-timeout DURATION",
        "How long to wait for MIN nodes, or for the leading node, before the run ends with 75 or "
        "76.",
        default="10m",
        type=Duration(min=1),
    ),
    _option("--node-name", "This node's name.  [default: SLURMD_NODENAME or the host name]"),
)

_PREEMPTION: Final = (
    _option(
        "--grace DURATION",
        "Time from a signal to the end of this node (120, 2m).  [default: 30s, or SLURM's]",
        type=Duration(min=0),
    ),
    _option(
        "--notice-source NAME",
        "Sources of preemption notices in addition to signals: slurm, aws, gcp, azure, none, auto "
        "to detect them, or an installed package's. Repeatable.",
        multiple=True,
        default=[AUTO],
        shell_complete=_complete_source,
    ),
    _option(
        "--notice-file PATH",
        "A file or FIFO to read notices from: [DURATION] [REASON], or warning [REASON].",
        type=_PATH,
    ),
    _option(
        "--on-warning",
        "What to do on a warning without a deadline: AWS's rebalance recommendation, GCP's and "
        "Azure's maintenance.",
        type=click.Choice(["save", "stop", "ignore"]),
        default="save",
    ),
    _option(
        "--acknowledge",
        "After the checkpoint is sealed, tell the platform not to wait (Azure).",
        is_flag=True,
    ),
)

_SAVING: Final = (
    _option(
        "--save-interval STEPS|DURATION|auto",
        "Save every N steps (100), at an interval of time with its unit (90s, 10m), or at the "
        "optimal interval (auto); overrides the script's.",
    ),
    _option(
        "--mtbf DURATION",
        "Expected time between failures (6h30m) for --save-interval auto, which refines it from "
        "the failures it observes.  [default: 6h]",
        type=Duration(min=1),
    ),
    *_RETENTION,
)

_STORAGE: Final = (
    _option(
        "--memory-dir DIR|off",
        "Write checkpoints here first, at the speed of memory; off writes to --dir.",
        default="/dev/shm",
    ),
    _option(
        "--replicas N",
        "Other nodes that keep a copy of what a node has in memory, so that a node which vanishes "
        "takes nothing with it: 0, 1 or 2.",
        default=1,
        type=click.IntRange(0, 2),
    ),
    _option(
        "--domain NAME",
        "What fails together with this node, as a zone or a rack: copies go to nodes of other "
        "ones.  [default: SLURM's switch]",
    ),
    _option(
        "--mirror URL",
        "Copy each sealed checkpoint to this bucket as well, while the job trains: s3://, gs:// or "
        "az:// with a prefix of the job's own.",
    ),
    _option(
        "--mirror-every DURATION",
        "Minimum time between two copies (10m).  [default: as soon as the last copy is done]",
        type=Duration(min=0),
    ),
    _option(
        "--bucket-rate SIZE",
        "Maximum bytes per second to the bucket (50MB, 64MiB).  [default: what training leaves]",
        type=Size(),
    ),
    _option(
        "--local-dir DIR",
        "With --dir URL: where this machine keeps its copy, on a disk of its own.  [default: "
        "~/.cache/elastic-ckpt]",
        type=_PATH,
    ),
    _option("--group-access", "Let the group read the job directory.", is_flag=True),
)

_OWN_CHECKPOINTS: Final = (
    _option(
        "--watch PATTERN",
        "A file or directory that the script saves itself, out/checkpoint-*: sealed when complete, "
        "verified before each start. Repeatable.",
        multiple=True,
    ),
    _option(
        "--complete-when FILE|quiet:DURATION|exit",
        "When such a checkpoint is complete: a file in it that is written last, no change for this "
        "long, or the script's exit.  [default: quiet:20s]",
    ),
    _option(
        "--resume-args 'ARG ...'",
        "Arguments for the script if there is an intact checkpoint of its own; {newest} is its "
        "path.",
        multiple=True,
    ),
    _option(
        "--on-notice signal:NAME|command:COMMAND",
        "How a script without a Session is asked to save.  [default: SIGTERM, which it may handle]",
    ),
    _option(
        "--finished-when PATH",
        "What the script leaves once all work is done.  [default: its exit code 0 without a "
        "notice]",
    ),
)

_FAILURES: Final = (
    _option(
        "--max-failures N",
        "Failures in a row to retry; a new checkpoint between two starts the count again.",
        default=3,
        type=_COUNT,
    ),
    _option(
        "--hang-seconds DURATION",
        "Minimum silence of all workers within a step that counts as a hang; ten times the job's "
        "own longest if that is more. Five times this while the job's pace is not known yet, for "
        "fetching, and while workers use CPU time.",
        default=f"{MIN_HANG_SECONDS:.0f}s",
        type=Duration(min=1),
    ),
)

_WATCHING: Final = (
    _option(
        "--metrics [HOST:]PORT",
        "Serve Prometheus metrics on this address, on 127.0.0.1 without HOST; port 0 picks a free "
        "one.",
    ),
    _option(
        "--metrics-file FILE",
        "Also write the metrics to FILE, which ends in .prom, for node_exporter's textfile "
        "collector.",
        type=_PATH,
    ),
    _option(
        "--web [HOST:]PORT",
        "Serve the report as a live page on this address, on 127.0.0.1 without HOST; another "
        "address needs the token that run prints; port 0 picks a free one.",
    ),
    _option(
        "--digests STEPS",
        "Note digests of each rank's state in the journal every so many steps, for elastic-ckpt "
        "replay.  [default: none]",
        default=0,
        show_default=False,
        type=click.IntRange(min=0),
    ),
)

GROUPS: Final[Mapping[str, tuple[_Declared, ...]]] = {
    "The job": _JOB,
    "Preemption": _PREEMPTION,
    "Saving and keeping": _SAVING,
    "Failures": _FAILURES,
    "Several nodes": _NODES,
    "Storage": _STORAGE,
    "Scripts with checkpoints of their own": _OWN_CHECKPOINTS,
    "Metrics, live page and replay": _WATCHING,
}
"""The options of ``run`` by heading, the most used first."""


def grouped(options: Sequence[click.Parameter]) -> dict[str, list[click.Option]]:
    """Return the options by heading, in the order of the help; ``--help`` belongs to the job."""
    found: dict[str, list[click.Option]] = {title: [] for title in GROUPS}
    for one in options:
        if isinstance(one, click.Option):
            found[one.group if isinstance(one, GroupedOption) else next(iter(GROUPS))].append(one)
    return found


def run_options(function: F) -> F:
    """Add all options of ``run``."""
    for title, group in reversed(list(GROUPS.items())):  # help shows them in their order
        for names, settings in reversed(group):
            function = click.option(*names, cls=GroupedOption, group=title, **settings)(function)
    return function


def retention_options(function: F) -> F:
    """Add ``--keep-last``, ``--keep-every`` and ``--keep-best``; ``prune`` has them as well."""
    for names, settings in reversed(_RETENTION):
        function = click.option(*names, **settings)(function)
    return function
