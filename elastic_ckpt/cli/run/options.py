"""Options of ``run`` that say who may give notice, and what a signal means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from elastic_ckpt.errors import UsageError
from elastic_ckpt.notices.platforms import AUTO, NONE, PLATFORMS
from elastic_ckpt.policy.retention import Retention, parse_best

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_GRACE_SECONDS: Final = 30.0


def notice_options(function: F) -> F:
    """``--notice-source``, ``--notice-file``, ``--on-warning`` and ``--acknowledge``."""
    for option in (
        click.option(
            "--acknowledge",
            is_flag=True,
            help="Once sealed, tell the platform that it need not wait; Azure listens.",
        ),
        click.option(
            "--on-warning",
            type=click.Choice(["save", "stop", "ignore"]),
            default="save",
            show_default=True,
            help="What a warning without a deadline leads to: AWS's rebalance recommendation, "
            "GCP's and Azure's maintenance.",
        ),
        click.option(
            "--notice-file",
            metavar="PATH",
            type=click.Path(path_type=Path, readable=False),
            help="A file or FIFO in which somebody says that this node goes away: "
            "[SECONDS] [REASON], or warning [REASON].",
        ),
        click.option(
            "--notice-source",
            multiple=True,
            default=[AUTO],
            show_default=True,
            metavar="NAME",
            shell_complete=_source_names,
            help="Whose word counts beside signals: slurm, aws, gcp, azure, none, or auto for "
            "those of this machine. May be given several times.",
        ),
    ):
        function = option(function)
    return function


def _source_names(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """For a shell that completes."""
    return [name for name in (AUTO, NONE, *PLATFORMS) if name.startswith(begun)]


def known_grace(given: float | None, platforms: Sequence[str]) -> float:
    """Seconds that a signal leaves: as given, as SLURM has it, or 30.

    Raises:
        UsageError: it is no number.
    """
    if given is not None:
        if not math.isfinite(given):
            raise UsageError(f"--grace {given} is no number of seconds")
        return given
    if "slurm" in platforms:
        from elastic_ckpt.notices.slurm import signal_grace

        return signal_grace() or DEFAULT_GRACE_SECONDS
    return DEFAULT_GRACE_SECONDS


def retention_options(function: F) -> F:
    """``--keep-last``, ``--keep-every``, ``--keep-best``."""
    count = click.IntRange(min=0)
    for option in (
        click.option(
            "--keep-best",
            metavar="N:METRIC[:max]",
            help="Keep the N checkpoints with the lowest (or highest) value that was reported.",
        ),
        click.option(
            "--keep-every",
            metavar="STEPS",
            default=0,
            type=count,
            help="Keep the first checkpoint of every STEPS steps.",
        ),
        click.option("--keep-last", metavar="N", default=0, type=count, help="Keep the newest N."),
    ):
        function = option(function)
    return function


def make_retention(last: int, every: int, best: str | None) -> Retention:
    """The rule; raises UsageError for what makes no sense."""
    count, metric, highest = parse_best(best) if best is not None else (0, "", False)
    return Retention(last=last, every=every, best=count, metric=metric, highest=highest)
