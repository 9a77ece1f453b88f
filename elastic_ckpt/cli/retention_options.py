"""The options that say which checkpoints are kept; ``run`` and ``prune`` share them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from elastic_ckpt.policy.retention import Retention, parse_best

F = TypeVar("F", bound=Callable[..., Any])


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
