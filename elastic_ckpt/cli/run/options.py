"""The options of ``run``, in the order of its help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from elastic_ckpt.cli.common import DirectoryOrUrl, Duration
from elastic_ckpt.cli.run.job_file import config_option
from elastic_ckpt.notices.platforms import AUTO, source_names
from elastic_ckpt.policy.hang import MIN_HANG_SECONDS

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path, readable=False)  # readable: a later error has a better exit code


_COUNT = click.IntRange(min=0)


def _option(syntax: str, text: str, **settings: Any) -> Callable[[Any], Any]:
    """Return the option with this syntax, ``--flag METAVAR``; help shows its default."""
    flag, _, metavar = syntax.partition(" ")
    settings.setdefault("show_default", "default" in settings)
    return click.option(flag, metavar=metavar or None, help=text, **settings)


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

_RUN: Final = (
    config_option,
    click.option(
        "--dir",
        "directory",
        envvar="ELASTIC_CKPT_DIR",
        required=True,
        type=DirectoryOrUrl(),
        help="The job directory, for checkpoints; or the URL of a bucket, which any machine "
        "continues from.",
    ),
    _option("--name", "The job's name.  [default: the directory's name]"),
    # workers and nodes
    _option(
        "--nproc",
        "Workers on this node: a number, or auto for one per GPU (one without GPUs).",
        default="auto",
    ),
    _option(
        "--nnodes MIN[:MAX]",
        "Number of nodes: the job starts and continues with MIN, and grows to MAX as nodes join.  "
        "[default: 1, the hostfile's, or those of SLURM's step]",
    ),
    _option(
        "--hostfile FILE",
        "The job's hosts, one per line: HOST or HOST slots=NPROC. The first one leads and starts "
        "the others over ssh.",
        type=_PATH,
    ),
    _option(
        "--rdzv-endpoint HOST[:PORT]",
        "Where the nodes meet, the same on every node; the node with this address leads.  "
        "[default: the hostfile's or SLURM's first]",
    ),
    _option(
        "--rdzv-timeout DURATION",
        "How long to wait for MIN nodes, or for the leading node, before the run ends with 75 or "
        "76.",
        default="10m",
        type=Duration(min=1),
    ),
    click.option(
        "--from",
        "start_from",
        metavar="NAME",
        help="Continue from this checkpoint, [SESSION/]epoch-N_step-M, and supersede newer ones. "
        "Once: a rerun of the same command continues from the newest.",
    ),
    # preemption notices
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
        "A file or FIFO to read notices from: [SECONDS] [REASON], or warning [REASON].",
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
    # periodic saves
    _option(
        "--save-interval STEPS|SECONDSs|auto",
        "Save every N steps (100), every N seconds (90s), or at the optimal interval (auto); "
        "overrides the script's.",
    ),
    _option(
        "--mtbf DURATION",
        "Expected time between failures (6h30m) for --save-interval auto, which refines it from "
        "the failures it observes.  [default: 6h]",
    ),
    # failures and hangs
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
    # what workers start with
    click.option(
        "-m",
        "--module",
        metavar="MODULE",
        help="Run a module in place of a script, as python -m does; options end here.",
    ),
    _option(
        "--python PATH",
        "The interpreter of the workers, for a supervisor in an environment of its own; it needs "
        "torch and the same version of elastic-ckpt.  [default: the supervisor's]",
    ),
    _option(
        "--global-batch SAMPLES",
        "Samples per optimizer step over all workers, at any number of workers: sets the "
        "accumulation.  [default: the script's accumulation]",
        type=click.IntRange(min=1),
    ),
    _option(
        "--preload MODULE,...",
        "Modules to import before workers start.  [default: torch, and ColossalAI if the script "
        "or its arguments name it]",
    ),
    # a script that saves by itself
    _option(
        "--watch PATTERN",
        "A file or directory that the script saves itself, out/checkpoint-*: sealed when complete, "
        "verified before each start. Repeatable.",
        multiple=True,
    ),
    _option(
        "--complete-when FILE|quiet:SECONDSs|exit",
        "When such a checkpoint is complete: a file in it that is written last, no change for so "
        "long, or the script's exit.  [default: quiet:20s]",
    ),
    _option(
        "--on-notice signal:NAME|command:COMMAND",
        "How a script without a Session is asked to save.  [default: SIGTERM, which it may handle]",
    ),
    _option(
        "--resume-args 'ARG ...'",
        "Arguments for the script if there is an intact checkpoint of its own; {newest} is its "
        "path.",
        multiple=True,
    ),
    _option(
        "--finished-when PATH",
        "What the script leaves once all work is done.  [default: its exit code 0 without a "
        "notice]",
    ),
    *_RETENTION,
    # a bucket
    _option(
        "--local-dir DIR",
        "With --dir URL: where this machine keeps its copy, on a disk of its own.  [default: "
        "~/.cache/elastic-ckpt]",
        type=_PATH,
    ),
    _option(
        "--mirror URL",
        "Copy each sealed checkpoint to this bucket as well, while the job trains: s3://, gs:// or "
        "az:// with a prefix of the job's own.",
    ),
    _option(
        "--mirror-every DURATION",
        "Copy at most so often (10m).  [default: as soon as the last copy is done]",
    ),
    _option(
        "--bucket-rate BYTES",
        "Bytes per second to the bucket at most (50MB).  [default: what training leaves]",
    ),
    # where the run writes, and who may read it
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
        "--digests STEPS",
        "Note digests of each rank's state in the journal every so many steps, for elastic-ckpt "
        "replay.  [default: none]",
        default=0,
        show_default=False,
        type=click.IntRange(min=0),
    ),
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
    _option("--group-access", "Let the group read the job directory.", is_flag=True),
    _option("--node-name", "This node's name.  [default: SLURMD_NODENAME or the host name]"),
)


def run_options(function: F) -> F:
    """Add all options of ``run`` except ``--print-config``."""
    return _apply(_RUN, function)


def retention_options(function: F) -> F:
    """Add ``--keep-last``, ``--keep-every`` and ``--keep-best``; ``prune`` has them as well."""
    return _apply(_RETENTION, function)


def _apply(options: tuple[Callable[[Any], Any], ...], function: F) -> F:
    for option in reversed(options):  # help shows them in their order
        function = option(function)
    return function
