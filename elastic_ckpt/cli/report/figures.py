"""The figures of the report for programs: what ``report --json`` prints."""

from __future__ import annotations

import msgspec

from elastic_ckpt import __version__
from elastic_ckpt.cli.report.answers import Answer, answers
from elastic_ckpt.cli.report.charts import recoveries
from elastic_ckpt.cli.report.market import MarketRow, cause_of, market_rows
from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.origin import Origin, origin_of
from elastic_ckpt.cli.report.tables import SaveRow, newest, save_rows
from elastic_ckpt.cli.report.tiers import TierRow, tier_rows
from elastic_ckpt.journal.time_account import Category


class CountsFigures(msgspec.Struct):
    """How often what happened, since the first start."""

    runs: int
    incarnations: int
    failures: int
    preemptions: int
    interruptions: int
    notices: int
    saves: int
    failed_saves: int
    refused_checkpoints: int


class FailureFigures(msgspec.Struct):
    """One failure and its cost.

    Attributes:
        label: as on the page, F1.
        at: when its ranks were gone, seconds since the epoch.
        kind: its class.
        rank: the first to fail; -1 if it was not a rank.
        node: where it began; empty if unknown.
        lost_steps: None if unknown, or if none was repeated yet.
    """

    label: str
    at: float
    kind: str
    rank: int
    node: str
    message: str
    lost_steps: int | None
    lost_seconds: float
    recovery_seconds: float
    waiting_seconds: float


class RecoveryFigures(msgspec.Struct):
    """From a failure to the end of the next step; seconds.

    Attributes:
        stages: the median of each that took time.
    """

    count: int
    median_seconds: float
    longest_seconds: float
    stages: dict[str, float]


class ReportFigures(msgspec.Struct, kw_only=True):
    """Everything that ``report --json`` prints. Times are seconds, sizes bytes, moments seconds
    since the epoch.

    Attributes:
        version: of the program that made it.
        directory: of the job, or its URL.
        at: when it was made.
        began, ended: what it covers.
        state: as in ``status --json``.
        answers: the five questions; a tone is empty, ``amber`` for time that was lost, or ``red``
            for data at risk.
        goodput: share of the time that was training which still counts; None without a supervisor.
        time: where the time went, by category; adds up to ``wall_seconds``.
        lost_steps: steps that had to be trained again, as far as it is known.
        failures: the newest 150, in order of time.
        recovery: None without one.
        market: what failed how often, by cause and by node, and what it cost.
        tiers: where copies are.
        metrics: the newest value that counts, of each that the script reported.
        origin: how it was run.
    """

    version: str
    job: str
    directory: str
    at: float
    began: float
    ended: float
    state: str
    answers: list[Answer]
    goodput: float | None
    wall_seconds: float
    time: dict[str, float]
    lost_steps: int
    counts: CountsFigures
    failures: list[FailureFigures]
    recovery: RecoveryFigures | None
    market: list[MarketRow]
    saves: list[SaveRow]
    tiers: list[TierRow]
    metrics: dict[str, float]
    origin: Origin


def figures(material: Material) -> ReportFigures:
    """Return what the page shows, as figures."""
    history, goodput = material.history, material.goodput
    return ReportFigures(
        version=__version__,
        job=material.status.job,
        directory=material.directory,
        at=material.at,
        began=material.began,
        ended=material.ended,
        state=material.status.state,
        answers=answers(material),
        goodput=goodput.fraction if history.is_supervised else None,
        wall_seconds=goodput.wall_seconds,
        time={category.value: goodput.seconds(category) for category in Category},
        lost_steps=sum(cost.lost_steps or 0 for cost in material.costs),
        counts=_counts(material),
        failures=[
            FailureFigures(
                label, one.at, cause_of(one), one.rank, one.node, one.message, cost.lost_steps,
                cost.lost_seconds, cost.recovery_seconds, cost.waiting_seconds,
            )
            for label, one, cost in newest(material.failures)
        ],
        recovery=_recovery(material),
        market=market_rows(material),
        saves=save_rows(material),
        tiers=tier_rows(material),
        metrics={one.name: one.last for one in material.steps.curves() if one.kept},
        origin=origin_of(material.records, history),
    )  # fmt: skip


def _counts(material: Material) -> CountsFigures:
    history = material.history
    return CountsFigures(
        runs=len(history.runs),
        incarnations=len(history.incarnations),
        failures=len(material.failures),
        preemptions=len(material.preemptions),
        interruptions=len(history.interruptions),
        notices=len(history.notices),
        saves=len(history.saves),
        failed_saves=sum(bool(one.error) for one in history.saves),
        refused_checkpoints=len(history.refused),
    )


def _recovery(material: Material) -> RecoveryFigures | None:
    found = recoveries(material)
    if found is None:
        return None
    stages = {name: median for _, name, _, median, _ in found.stages}
    return RecoveryFigures(found.count, found.median, found.longest, stages)
