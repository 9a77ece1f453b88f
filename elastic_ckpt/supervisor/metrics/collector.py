"""Collects all metrics when they are requested, in the thread of the request.

The supervisor's loop takes no part: the board is shared memory, the record is copied, and a thread
follows the journal.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import psutil
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from elastic_ckpt import __version__
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.run_state import TERMINAL, RunState
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.protocol.start_marks import Breakdown
from elastic_ckpt.supervisor.metrics import table
from elastic_ckpt.supervisor.metrics.counts import TIERS, Durations, JobCounts
from elastic_ckpt.supervisor.metrics.journal_follower import JournalFollower
from elastic_ckpt.supervisor.metrics.table import Kind, Metric
from elastic_ckpt.supervisor.run_record import RunRecord
from elastic_ckpt.util.text import printable

LOOK_SECONDS: Final = 0.5
"""How long a request waits for the journal's newest lines."""

Sample = tuple[Metric, tuple[str, ...], float | Durations]
"""A metric, its labels' values, its value."""

_Value = tuple[tuple[str, ...], float | Durations]


class NodeCollector(Collector):
    """The metrics of one node; the leading one has a ``feed``, and so the job's metrics."""

    def __init__(self, board: Board, record: RunRecord, feed: JournalFollower | None) -> None:
        self._board = board
        self._run = record
        self._feed = feed

    def describe(self) -> Iterable[Family]:
        """Return all metrics, without values."""
        return _families("", [], table.METRICS)

    def collect(self) -> Iterable[Family]:
        """Return the metrics that have a value now."""
        if self._feed is not None:
            self._feed.look(LOOK_SECONDS)
        # A copy is one step of the interpreter: the loop replaces the record's fields meanwhile,
        # and never writes into one.
        record = copy.copy(self._run.node)
        slots = [slot for slot in self._board.read_slots() if slot.pid]
        samples = [*_of_node(record), *_of_workers(slots)]
        if self._feed is not None:
            samples += [*_of_job(record), *_of_training(slots)]
            now = None if record.state in TERMINAL else self._feed.now
            samples += self._feed.read(lambda history: list(_of_history(history, now))) or []
        present = {metric for metric, _, _ in samples}
        shown = [metric for metric in table.METRICS if metric in present]
        return _families(record.job, samples, shown)


# -- samples ----------------------------------------------------------------------------------


def _of_node(record: NodeRecord) -> Iterator[Sample]:
    labels = (printable(record.node), printable(record.run_id), __version__)
    yield table.INFO, labels, 1.0
    yield table.WRITTEN, (), time.time()
    yield table.STARTED, (), record.since
    for state in RunState:
        yield table.STATE, (state.value,), float(record.state is state)
    if record.notice is not None:
        yield table.DEADLINE, (), record.notice.deadline + time.time() - time.monotonic()


def _of_workers(slots: Sequence[Slot]) -> Iterator[Sample]:
    for slot in slots:
        rank = (str(slot.rank),)
        if slot.step_ns:
            yield table.STEP_SECONDS, rank, slot.step_ns / 1e9
        if slot.busy_ns:
            yield table.BUSY_SECONDS, rank, slot.busy_ns / 1e9
        if slot.beat:
            yield table.BEAT, rank, time.time() - (time.monotonic_ns() - slot.beat) / 1e9
        size = _resident(slot.pid)
        if size is not None:
            yield table.MEMORY, rank, size


def _resident(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).memory_info().rss)
    except (psutil.Error, ValueError, OverflowError):
        return None


def _of_job(record: NodeRecord) -> Iterator[Sample]:
    yield table.INCARNATION, (), record.incarnation
    yield table.NODES, (), len(record.present) or 1
    yield table.FAILURES_LEFT, (), record.failures_left
    if record.last_recovery is not None:
        found = record.last_recovery.stages
        for stage in Breakdown().stages:
            yield table.RECOVERY, (stage,), found.get(stage, 0.0)


def _of_training(slots: Sequence[Slot]) -> Iterator[Sample]:
    """Yield from the ranks of this node; the script's own metrics from rank 0."""
    attached = [slot for slot in slots if slot.attached]
    if not attached:
        return
    last = min(attached, key=lambda slot: slot.finished)
    session = (printable(last.session),)
    yield table.STEP, session, last.shown_step
    yield table.EPOCH, session, last.epoch
    yield table.EPOCH_SAMPLES, session, last.sample_start_index
    if last.samples_per_step:
        yield table.STEP_SAMPLES, session, last.samples_per_step
    if last.total_steps:
        yield table.FINAL_STEP, session, last.total_steps
    first = next((slot for slot in attached if slot.rank == 0), None)
    reported = first.metrics if first is not None else {}
    for name, value in {printable(name): value for name, value in reported.items()}.items():
        yield table.REPORTED, (*session, name), value


def _of_history(history: JobCounts, now: float | None) -> Iterator[Sample]:
    """Yield the journal's; ``now`` is as for :meth:`TimeAccount.spans`."""
    time_so_far = history.time.goodput(now)
    for category in Category:
        yield table.TIME, (category.value,), time_so_far.seconds(category)
    if time_so_far.fraction is not None:
        yield table.GOODPUT, (), time_so_far.fraction
    for cause, count in history.restarts.items():
        yield table.RESTARTS, (cause,), count
    for kind, count in history.crashes.items():
        yield table.CRASHES, (kind,), count
    for (reason, tier), count in history.saves.items():
        yield table.SAVES, (reason, tier), count
    yield table.SAVE_FAILURES, (), history.save_failures
    yield table.STALL, (), history.stall_seconds
    yield table.DRAIN_DURATION, (), history.drain_durations
    yield table.DRAIN_FAILURES, (), history.drain_failures
    yield table.QUARANTINED, (), history.quarantined
    for tier in TIERS:
        yield table.SAVE_DURATION, (tier,), history.save_durations[tier]
        newest = history.newest(tier)
        if newest is not None:
            labels = (printable(newest.session), tier)
            yield table.CHECKPOINT_STEP, labels, newest.step
            yield table.CHECKPOINT_TIME, labels, newest.wall
            if newest.bytes is not None:
                yield table.CHECKPOINT_BYTES, labels, newest.bytes


# -- the library's types ----------------------------------------------------------------------


def _families(job: str, samples: Iterable[Sample], shown: Iterable[Metric]) -> list[Family]:
    values: dict[Metric, list[_Value]] = {metric: [] for metric in shown}
    for metric, labels, value in samples:
        values[metric].append(((printable(job), *labels), value))
    return [_family(metric, found) for metric, found in values.items()]


def _family(metric: Metric, values: Iterable[_Value]) -> Family:
    labels = ("job_name", *metric.labels)
    match metric.kind:
        case Kind.INFO:
            info = InfoMetricFamily(metric.name.removesuffix("_info"), metric.text, labels=labels)
            for where, _ in values:
                info.add_metric(where, {})
            return info
        case Kind.HISTOGRAM:
            durations = HistogramMetricFamily(metric.name, metric.text, labels=labels)
            for where, value in values:
                if isinstance(value, Durations):
                    durations.add_metric(where, value.buckets, value.sum)
            return durations
        case Kind.COUNTER | Kind.GAUGE:
            make = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
            family = make(metric.name, metric.text, labels=labels)
            for where, value in values:
                if not isinstance(value, Durations):
                    family.add_metric(where, value)
            return family
