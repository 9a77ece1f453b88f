"""Looks up all metrics at the moment that somebody asks for them, in that one's thread.

The supervisor's loop takes no part: the board is shared memory, the record is copied, the journal
is followed by a thread of its own.
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
from elastic_ckpt.supervisor.metrics.counts import TIERS, Durations, JobHistory
from elastic_ckpt.supervisor.metrics.journal_follower import JournalFeed
from elastic_ckpt.supervisor.metrics.table import Kind, Metric
from elastic_ckpt.supervisor.run_record import RunRecord
from elastic_ckpt.util.text import printable

LOOK_SECONDS: Final = 0.5
"""How long who asks waits for the journal's newest lines."""

Sample = tuple[Metric, tuple[str, ...], float | Durations]
"""A metric, its labels' values, its value."""

_Value = tuple[tuple[str, ...], float | Durations]


class NodeCollector(Collector):
    """Of one node.

    Args:
        feed: None on a node that follows: what the whole job does, the one that leads tells.
    """

    def __init__(self, board: Board, record: RunRecord, feed: JournalFeed | None) -> None:
        self._board = board
        self._run = record
        self._feed = feed

    def describe(self) -> Iterable[Family]:
        """All metrics, without values."""
        return _families("", [], table.METRICS)

    def collect(self) -> Iterable[Family]:
        """Those that there are now."""
        if self._feed is not None:
            self._feed.look(LOOK_SECONDS)
        # One step of the interpreter: the loop changes the record meanwhile, field by field, and
        # each of them is replaced and never written into.
        record = copy.copy(self._run.node)
        slots = [slot for slot in self._board.read_slots() if slot.pid]
        samples = [*_of_node(record), *_of_workers(slots)]
        if self._feed is not None:
            samples += [*_of_job(record), *_of_training(slots)]
            now = None if record.state in TERMINAL else self._feed.now
            samples += self._feed.read(lambda history: list(_of_history(history, now))) or []
        told = {metric for metric, _, _ in samples}
        shown = [metric for metric in table.METRICS if metric in told]
        return _families(record.job, samples, shown)


# -- what there is to tell --------------------------------------------------------------------


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
    """From the ranks that take part; rank 0 is of the node that leads, and its word counts."""
    begun = [slot for slot in slots if slot.attached]
    if not begun:
        return
    last = min(begun, key=lambda slot: slot.finished)
    yield table.STEP, (), last.shown_step
    yield table.EPOCH, (), last.epoch
    yield table.EPOCH_SAMPLES, (), last.sample_start_index
    if last.samples_per_step:
        yield table.STEP_SAMPLES, (), last.samples_per_step
    if last.total_steps:
        yield table.FINAL_STEP, (), last.total_steps
    first = next((slot for slot in begun if slot.rank == 0), None)
    said = first.metrics if first is not None else {}
    for name, value in {printable(name): value for name, value in said.items()}.items():
        yield table.REPORTED, (name,), value


def _of_history(history: JobHistory, now: float | None) -> Iterator[Sample]:
    """
    Args:
        now: as for :meth:`TimeAccount.spans`.
    """
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
            yield table.CHECKPOINT_STEP, (tier,), newest.step
            yield table.CHECKPOINT_TIME, (tier,), newest.wall
            if newest.bytes is not None:
                yield table.CHECKPOINT_BYTES, (tier,), newest.bytes


# -- as the library wants it ------------------------------------------------------------------


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
