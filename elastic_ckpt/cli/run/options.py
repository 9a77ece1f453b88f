"""The options of ``run``, in groups, in the order of its help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from elastic_ckpt.cli.run.job_file import config_option
from elastic_ckpt.notices.platforms import AUTO, source_names
from elastic_ckpt.policy.hang import MIN_HANG_SECONDS

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path, readable=False)  # readable: a later error has a better exit code


class Options(Protocol):
    """A decorator that adds options to a command."""

    def __call__(self, function: F, /) -> F:
        """Add them."""
        ...


def _group(*options: Callable[[Any], Any]) -> Options:
    """Return one decorator for several, whose options help shows in this order."""

    def apply(function: F, /) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def _complete_source(_: click.Context, __: click.Parameter, prefix: str) -> list[str]:
    """Complete ``--notice-source`` in a shell."""
    return [name for name in source_names() if name.startswith(prefix)]


job_options = _group(
    click.option(
        "--dir",
        "directory",
        envvar="ELASTIC_CKPT_DIR",
        required=True,
        type=_PATH,
        help="The job directory, for checkpoints.",
    ),
    click.option("--name", help="The job's name.  [default: the directory's name]"),
)
"""The job and its directory."""

node_options = _group(
    click.option(
        "--nproc",
        default="auto",
        show_default=True,
        help="Workers on this node: a number, or auto for one per GPU (one without GPUs).",
    ),
    click.option(
        "--nnodes",
        metavar="MIN[:MAX]",
        help="Number of nodes: the job starts and continues with MIN, and grows to MAX as "
        "nodes join.  [default: 1, the hostfile's, or those of SLURM's step]",
    ),
    click.option(
        "--hostfile",
        metavar="FILE",
        type=_PATH,
        help="The job's hosts, one per line: HOST or HOST slots=NPROC. The first one leads and "
        "starts the others over ssh.",
    ),
    click.option(
        "--rdzv-endpoint",
        metavar="HOST[:PORT]",
        help="Where the nodes meet, the same on every node; the node with this address leads.  "
        "[default: the hostfile's or SLURM's first]",
    ),
    click.option(
        "--rdzv-timeout",
        metavar="SECONDS",
        default=600.0,
        show_default=True,
        type=click.FloatRange(min=1),
        help="Seconds to wait for MIN nodes, or for the leading node, before the run ends with "
        "75 or 76.",
    ),
)
"""Workers and nodes."""

notice_options = _group(
    click.option(
        "--grace",
        metavar="SECONDS",
        type=click.FloatRange(min=0),
        help="Seconds from a signal to the end of this node.  [default: 30, or SLURM's]",
    ),
    click.option(
        "--notice-source",
        multiple=True,
        default=[AUTO],
        show_default=True,
        metavar="NAME",
        shell_complete=_complete_source,
        help="Sources of preemption notices in addition to signals: slurm, aws, gcp, azure, "
        "none, auto to detect them, or an installed package's. Repeatable.",
    ),
    click.option(
        "--notice-file",
        metavar="PATH",
        type=_PATH,
        help="A file or FIFO to read notices from: [SECONDS] [REASON], or warning [REASON].",
    ),
    click.option(
        "--on-warning",
        type=click.Choice(["save", "stop", "ignore"]),
        default="save",
        show_default=True,
        help="What to do on a warning without a deadline: AWS's rebalance recommendation, "
        "GCP's and Azure's maintenance.",
    ),
    click.option(
        "--acknowledge",
        is_flag=True,
        help="After the checkpoint is sealed, tell the platform not to wait (Azure).",
    ),
)
"""Preemption notices."""

save_options = _group(
    click.option(
        "--save-interval",
        metavar="STEPS|SECONDSs|auto",
        help="Save every N steps (100), every N seconds (90s), or at the optimal interval "
        "(auto); overrides the script's.",
    ),
    click.option(
        "--mtbf",
        metavar="DURATION",
        help="Expected time between failures (6h30m) for --save-interval auto, which refines "
        "it from the failures it observes.  [default: 6h]",
    ),
)
"""Periodic saves."""

failure_options = _group(
    click.option(
        "--max-failures",
        metavar="N",
        default=3,
        show_default=True,
        type=click.IntRange(min=0),
        help="Consecutive failures to retry.",
    ),
    click.option(
        "--hang-seconds",
        metavar="SECONDS",
        default=MIN_HANG_SECONDS,
        show_default=True,
        type=click.FloatRange(min=1),
        help="Minimum silence of all workers within a step that counts as a hang; ten times "
        "the job's own longest if that is more.",
    ),
)
"""Failures and hangs."""

worker_options = _group(
    click.option(
        "--global-batch",
        type=click.IntRange(min=1),
        metavar="SAMPLES",
        help="Samples per optimizer step over all workers, at any number of workers: sets the "
        "accumulation.  [default: the script's accumulation]",
    ),
    click.option(
        "--preload",
        metavar="MODULE,...",
        help="Modules to import before workers start.  [default: torch, "
        "and ColossalAI if the script or its arguments name it]",
    ),
)
"""What workers start with."""

retention_options = _group(
    click.option(
        "--keep-last", metavar="N", default=0, type=click.IntRange(min=0), help="Keep the newest N."
    ),
    click.option(
        "--keep-every",
        metavar="STEPS",
        default=0,
        type=click.IntRange(min=0),
        help="Keep the first checkpoint of every STEPS steps.",
    ),
    click.option(
        "--keep-best",
        metavar="N:METRIC[:max]",
        help="Keep the N checkpoints with the lowest (or highest) reported value.",
    ),
)
"""``--keep-last``, ``--keep-every`` and ``--keep-best``; ``prune`` has them as well."""

output_options = _group(
    click.option(
        "--memory-dir",
        metavar="DIR|off",
        default="/dev/shm",
        show_default=True,
        help="Write checkpoints here first, at the speed of memory; off writes to --dir.",
    ),
    click.option(
        "--metrics",
        metavar="[HOST:]PORT",
        help="Serve Prometheus metrics on this address, on 127.0.0.1 without HOST; port 0 "
        "picks a free one.",
    ),
    click.option(
        "--metrics-file",
        metavar="FILE",
        type=_PATH,
        help="Also write the metrics to FILE, which ends in .prom, for node_exporter's "
        "textfile collector.",
    ),
    click.option("--group-access", is_flag=True, help="Let the group read the job directory."),
    click.option(
        "--node-name", help="This node's name.  [default: SLURMD_NODENAME or the host name]"
    ),
)
"""Where the run writes, and who may read it."""

run_options = _group(
    config_option,
    job_options,
    node_options,
    notice_options,
    save_options,
    failure_options,
    worker_options,
    retention_options,
    output_options,
)
"""All options of ``run`` except ``--print-config``."""
