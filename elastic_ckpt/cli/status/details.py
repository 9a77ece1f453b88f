"""All that ``status -v`` prints below the first lines, for terminals of any width."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from elastic_ckpt.cli.status.nodes import NodeView
from elastic_ckpt.cli.status.progress import ProgressView
from elastic_ckpt.cli.status.saves import AuditView, EmergencySaveView, LastSaveView
from elastic_ckpt.cli.status.view import NewestView, StatusView
from elastic_ckpt.cli.status.workers import WorkerView, silent_seconds
from elastic_ckpt.jobdir.node_record import FailureRecord, RecoveryRecord
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.policy.failure import FailureClass
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes, human_duration

_TAIL_LINES: Final = 6  # of a failed rank's output; elastic-ckpt logs has the rest
_STACK_LINES: Final = 3  # of each rank; the report has more
_MOST_RANKS: Final = 12
_MOST_REJECTED: Final = 5
_BAR_WIDTH: Final = 40
NARROW: Final = 60

_PARTS: Final = {
    Category.TRAINING: ("█", "green"),
    Category.STALL: ("▓", "cyan"),
    Category.LOST_WORK: ("x", "red"),
    Category.RECOVERY: ("▒", "yellow"),
    Category.WAITING: ("·", "dim"),
    Category.SETUP: ("░", "blue"),
}
"""Character and colour of each in the bar; a pipe or NO_COLOR leaves the characters."""


def details(view: StatusView, width: int) -> list[RenderableType]:
    """Return everything below the first lines: facts, nodes and ranks."""
    parts = _laid_out(_facts(view, width), width)
    if view.nodes:
        parts.append(_nodes(view))
    if view.workers:
        parts += _workers(view.workers)
    return parts


def _laid_out(facts: list[tuple[str, Text]], width: int) -> list[RenderableType]:
    """Return labels beside their texts, or above them on a narrow terminal."""
    if width < NARROW:
        stacked: list[RenderableType] = []
        for name, value in facts:
            stacked += [*[Text(name, "dim")] * bool(name), Padding(value, (0, 0, 0, 1))]
        return stacked
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    return [table]


def _facts(view: StatusView, width: int) -> list[tuple[str, Text]]:
    """Return label and text of each line; ``Text``, so that a message cannot add mark-up."""
    room = width - (2 if width < NARROW else 22)
    bar_width = max(8, min(_BAR_WIDTH, room))
    facts: list[tuple[str, Text]] = []

    def add(name: str, text: str | Text) -> None:
        facts.append((name, Text(text) if isinstance(text, str) else text))

    if view.notice is not None:
        left, notice = view.notice.seconds_left, view.notice
        add("notice", Text(f"{notice.reason} from {notice.source}, {left:.0f} s left", "yellow"))
    if view.progress is not None:
        add("progress", _progress(view, view.progress, bar_width))
    facts += [("step size", Text(view.step_size, "yellow"))] * bool(view.step_size)
    add("newest intact", _newest(view))
    if view.at_risk is not None:
        add("at risk", at_risk_text(view))
    facts += _lists(view)
    if view.last_save is not None:
        add("last save", _save(view.last_save))
    if view.mirror:
        add(
            "mirror",
            Text(
                view.mirror,
                "yellow" if ": failing" in view.mirror or ": off" in view.mirror else "",
            ),
        )
    if view.last_emergency_save is not None:
        add("last emergency save", _emergency(view.last_emergency_save))
    if view.save_interval is not None:
        add("save interval", view.save_interval.why)
    if view.last_failure is not None:
        add("last failure", _failure(view, view.last_failure, room))
    if view.last_recovery is not None:
        add("last recovery", _recovery(view.last_recovery))
    restarts = view.restarts
    add(
        "restarts",
        f"{restarts.failures} after failures ({restarts.failures_left} left), "
        f"{restarts.preemptions} after preemptions",
    )
    if view.last_audit is not None:
        add("replayed", _audit(view.last_audit))
    if view.goodput is not None:
        add("goodput", _goodput(view, bar_width, room))
    if view.supervisor is not None:
        watch = view.supervisor
        alive = {True: "alive", False: "gone", None: "on another host"}[watch.alive]
        add("supervisor", f"pid {watch.pid} on {watch.host}, {alive}")
    return facts


def _lists(view: StatusView) -> Iterator[tuple[str, Text]]:
    """Yield what is in memory only, what failed verification, and nodes that a job which does not
    run leaves out; a running one has a warning for each."""
    for node in view.left_out:
        if node.text not in view.warnings:
            yield "left out", Text(node.text, "yellow")
    for left in view.memory_only[:_MOST_REJECTED]:
        yield "in memory only", Text(f"{left.text}\n{left.todo}", "yellow")
    for bad in view.rejected[:_MOST_REJECTED]:
        yield "rejected", Text(f"{printable(Path(bad.path).name)}: {bad.reason}", "red")
    if len(view.rejected) > _MOST_REJECTED:
        more = len(view.rejected) - _MOST_REJECTED
        yield "", Text(f"and {more} more: elastic-ckpt list")


def _progress(view: StatusView, found: ProgressView, width: int) -> Text:
    text, place = Text(), view.position
    if found.total_steps:
        share = min(1.0, found.step / found.total_steps)
        done = round(share * width)
        text.append("━" * done, "green").append("╌" * (width - done), "dim")
        text.append(f" {share:.0%}\n")
    text.append(f"step {found.step}" + (f" of {found.total_steps}" if found.total_steps else ""))
    if place is not None:
        text.append(f", epoch {place.epoch}, sample {place.sample_start_index}")
    rates = []
    silent = silent_seconds(view.workers)
    if silent is not None:
        rates.append(f"no step for {human_duration(silent)}")
    elif found.steps_per_second:
        rates.append(f"{found.steps_per_second:.3g} steps/s")
    if found.samples_per_second:
        rates.append(f"{found.samples_per_second:.3g} samples/s")
    if found.seconds_to_end is not None:
        rates.append(f"{human_duration(found.seconds_to_end)} to the end")
    rates += [f"{name} {value:.4g}" for name, value in view.reported.items()]
    if rates:
        text.append("\n" + ", ".join(rates))
    return text


def _newest(view: StatusView) -> str:
    newest, on_disk = view.newest_intact, view.newest_on_disk
    if newest is None:
        return (
            "none intact: a restart would end with 65"
            if view.is_stuck
            else "none: a restart would start at step 0"
        )
    if newest.tier != "memory":
        return _checkpoint(newest)
    rest = _checkpoint(on_disk) if on_disk else "in memory only"
    return f"{_checkpoint(newest)}\n{rest}"


def _checkpoint(one: NewestView) -> str:
    read_back = ", verified" if one.verified else ""
    name = Path(one.path).name if one.reason == "script" else f"step {one.step}"
    return (
        f"{name} ({one.reason}, {one.tier}, {human_bytes(one.bytes)}, "
        f"{human_duration(one.age_seconds)} old{read_back})"
    )


def at_risk_text(view: StatusView) -> str:
    """Return what a loss of the node would cost now."""
    risk = view.at_risk
    if risk is None or (risk.steps == 0 and risk.seconds < 1.0):
        return "nothing, if this node died now"
    steps = "" if risk.steps is None else f"{risk.steps} step{'s'[: risk.steps != 1]}, "
    return f"{steps}{human_duration(risk.seconds)} of training, if this node died now"


def _audit(audit: AuditView) -> Text:
    steps = f"steps {audit.first + 1} to {audit.last}, {human_duration(audit.age_seconds)} ago"
    if audit.different:
        return Text(f"{steps}: DIFFERENT at {audit.different}", "red")
    return Text(f"{steps}: {'equal within bounds' if audit.bounds else 'equal to the bit'}")


def _save(save: LastSaveView) -> Text:
    if save.error:
        return Text(f"{save.reason}, FAILED: {save.error}", "red")
    took = f"{save.reason}, {save.actual_seconds:.2f} s"
    return Text(f"{took}; training stalled for {save.stall_seconds:.2f} s")


def _emergency(save: EmergencySaveView) -> str:
    known = save.predicted_seconds
    predicted = "not predicted" if known is None else f"predicted {human_duration(known)}"
    return f"{predicted}, took {human_duration(save.actual_seconds)}"


def _failure(view: StatusView, last: FailureRecord, room: int) -> str:
    """Return the failure, the end of the rank's output, which usually shows the reason, and of a
    hang where each rank was."""
    rank = f"rank {last.rank}, " if last.rank >= 0 else ""
    ago = human_duration(max(0.0, time.time() - last.wall))
    lines = [f"{rank}{last.kind}, {ago} ago: {last.message}"]
    stopped = view.last_interruption
    hung = stopped is not None and last.kind == FailureClass.HANG.value == stopped.kind
    stacks = _stacks(stopped.stacks) if hung and stopped is not None else ()
    shown = (f"  {printable(line, max(20, room - 6))}" for line in stacks)
    return "\n".join([*lines, *tail_lines(last, room), *shown])


def _stacks(frames: Sequence[str]) -> Iterator[str]:
    """Yield the innermost frames of each rank."""
    seen: Counter[str] = Counter()
    for frame in frames:
        rank = frame.partition(":")[0]
        seen[rank] += 1
        if seen[rank] <= _STACK_LINES:
            yield frame


def tail_lines(last: FailureRecord, room: int) -> list[str]:
    """Return the last lines that the failed rank printed, cut to fit."""
    return [f"  {printable(line, max(20, room - 6))}" for line in last.tail[-_TAIL_LINES:]]


def _recovery(last: RecoveryRecord) -> str:
    stages = ", ".join(
        f"{name.replace('_', ' ')} {seconds:.2f}"
        for name, seconds in last.stages.items()
        if seconds
    )
    return f"{last.total_seconds:.1f} s: {stages}; from step {last.step} ({last.tier})"


def _goodput(view: StatusView, width: int, room: int) -> Text:
    """Return the goodput, a bar of where the time went, and the seconds."""
    wall = view.time.wall_seconds
    spent = {one: view.time.seconds(one) for one in Category if view.time.seconds(one) > 0}
    text = Text(f"{view.goodput:.0%} of {human_duration(wall)}\n")
    at = filled = 0.0
    for one, value in spent.items():
        at += value / max(wall, 1e-9) * width
        text.append(_PARTS[one][0] * round(at - filled), _PARTS[one][1])
        filled = round(at)
    column = room + 1
    for one, value in spent.items():  # break lines between parts
        words = f" {_name(one)} {human_duration(value)}"
        ends = column + len(words) + 3 > room
        column = len(words) + 1 + (0 if ends else column + 2)
        text.append("\n" if ends else "  ").append(*_PARTS[one]).append(words)
    return text


def _name(category: Category) -> str:
    return category.value.replace("_", " ")


def _nodes(view: StatusView) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("node", "host", "state", "activity"):
        table.add_column(title, overflow="fold")
    for node in view.nodes:
        name = f"{node.node} (leads{_takeover(node)})" if node.leads else node.node
        state = "gone" if node.alive is False else node.state
        table.add_row(name, node.host, state, node.message)
    return table


def _takeover(node: NodeView) -> str:
    if not node.took_over_from:
        return ""
    since = time.strftime("%H:%M:%S", time.localtime(node.since))
    return f" since {since}, in place of {node.took_over_from}"


def _workers(workers: list[WorkerView]) -> list[RenderableType]:
    """Return the ranks; of many, those that stand out, and a line on the others."""
    shown = sorted(workers, key=_stands_out)[:_MOST_RANKS]
    parts: list[RenderableType] = [_table(sorted(shown, key=lambda worker: worker.rank))]
    rest = [worker for worker in workers if worker not in shown]
    if rest:
        phases = ", ".join(sorted({worker.phase for worker in rest}))
        steps = sorted({worker.step for worker in rest})
        where = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        parts.append(Text(f"and {len(rest)} more ranks: {phases}, {where}", "dim"))
    return parts


def _stands_out(worker: WorkerView) -> tuple[bool, int, float, int]:
    silent = -(worker.last_beat_seconds or 0.0) if (worker.last_beat_seconds or 0.0) > 10 else 0.0
    return worker.slow is None, worker.step, silent, worker.rank


def _table(workers: list[WorkerView]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    multi_node = len({worker.node for worker in workers}) > 1
    on_gpus = any(worker.gpu_bytes is not None for worker in workers)
    titles = ["node"] * multi_node + ["rank", "pid", "phase", "step", "last beat", "memory", "cpu"]
    for title in [*titles, *["gpu"] * on_gpus, "own work"]:
        justify: Literal["left", "right"] = "left" if title in ("node", "phase") else "right"
        table.add_column(title, justify=justify, overflow="fold")
    for worker in workers:
        beat, cpu = worker.last_beat_seconds, worker.cpu_percent
        cells = [worker.node] * multi_node + [
            str(worker.rank),
            str(worker.pid),
            worker.phase,
            str(worker.step),
            "-" if beat is None else f"{beat:.1f} s",
            human_bytes(worker.rss_bytes),
            "-" if cpu is None else f"{cpu:.0f} %",
        ]
        style = "bold yellow" if worker.slow is not None else ""
        table.add_row(*cells, *[_gpu(worker)] * on_gpus, _own_work(worker), style=style)
    return table


def _gpu(worker: WorkerView) -> str:
    busy = "" if worker.gpu_percent is None else f", {worker.gpu_percent:.0f} %"
    return f"{human_bytes(worker.gpu_bytes)}{busy}"


def _own_work(worker: WorkerView) -> str:
    """Return ``80 of 120 ms``: own work of a step, and whether the others wait for it."""
    if worker.step_seconds is None or worker.busy_seconds is None:
        return "-"
    times = f"{_milliseconds(worker.busy_seconds)} of {_milliseconds(worker.step_seconds)} ms"
    return times if worker.slow is None else f"{times}, SLOW: {worker.slow:.1f} x the others'"


def _milliseconds(seconds: float) -> str:
    """Return three digits, or all before the point."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
