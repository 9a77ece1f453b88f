"""How an incarnation ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from enum import Enum
from typing import Final

import msgspec

from elastic_ckpt.protocol.slot import Outcome, SessionStage, Slot

EARLY_SECONDS: Final = 10.0
"""How long ranks whose Session is open may go on after a rank ended without having closed one."""


OF_ANOTHER: Final = (
    "Connection closed by peer",  # gloo
    "Connection reset by peer",
    "remote process exit",  # NCCL
)
"""In the message of a worker that failed because another one had."""


class EndKind(Enum):
    """How an incarnation ended; the values are the journal's."""

    COMPLETED = "completed"  # every worker finished its work
    STOPPED = "stopped"  # every worker left at the agreed stop step, after a sealed checkpoint
    NOT_BEGUN = "not-begun"  # a stop came before any rank had begun a step
    CRASHED = "crashed"
    CUT_SHORT = "cut-short"  # ended on this node because of another node


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An incarnation is over and none of its processes is left.

    Attributes:
        rank, exit_code, message: the worker that failed first; exit codes below 0 are signals.
            Without a failure the message says what a rank left unsaved.
        node: that worker's, on several nodes; empty if no worker failed by itself.
        stepped: whether any rank had begun a step.
        steps: optimizer steps finished in this incarnation.
        finished: the last finished step, as the script counts it.
        lived: seconds from the failed worker's start to its failure.
        attached: whether the script made a Session or called should_save.
        sealed: whether every rank's Session has all its steps in a checkpoint.
        failed_at, noticed_at, gone_at: when the worker failed, the agent noticed, and the last
            process was gone; monotonic nanoseconds. A worker that posts its failure posts the
            time; for one that died it is when the kernel woke the agent.
        failed_wall: ``failed_at`` in wall clock seconds, to compare nodes.
        out_of_memory: the kernel killed a process for memory during this incarnation.
        lost: names of the nodes that vanished.
        tail: the last lines that the first failed worker printed.
    """

    incarnation: int
    kind: EndKind
    rank: int = -1
    exit_code: int = 0
    message: str = ""
    stepped: bool = False
    steps: int = 0
    finished: int = 0
    lived: float = 0.0
    attached: bool = False
    sealed: bool = False
    failed_at: int = 0
    noticed_at: int = 0
    gone_at: int = 0
    failed_wall: float = 0.0
    out_of_memory: bool = False
    lost: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()
    node: str = ""

    @property
    def failed(self) -> bool:
        """Whether any rank was interrupted or failed."""
        return self.kind in (EndKind.CRASHED, EndKind.CUT_SHORT)

    @property
    def what(self) -> str:
        """One line on what happened; empty without a failure."""
        return f"rank {self.rank} failed: {self.message}" if self.rank >= 0 else self.message


def outcome_of_zero(slot: Slot, *, stop_wanted: bool) -> Outcome:
    """Return the outcome of a worker that ended with code 0 and posted none, as by ``os._exit``.

    Returns:
        NONE if it had work that is not saved: that is a failure.
    """
    if slot.session_stage is SessionStage.OPEN:
        return Outcome.NONE
    if stop_wanted and not slot.attached:  # nobody knows whether it was done
        return Outcome.STOPPED_UNSAVED
    return Outcome.COMPLETED


def ended_early(slots: Sequence[Slot], now: int) -> Slot | None:
    """Return a rank that ended with code 0, although others train or wait for it.

    Args:
        now: monotonic nanoseconds.
    """
    waits = any(slot.outcome is Outcome.NONE and _needs_all(slot) for slot in slots)
    gone = (
        slot for slot in slots
        if slot.outcome is Outcome.COMPLETED and slot.session_stage is not SessionStage.SEALED
        and now - slot.left > EARLY_SECONDS * 1e9
    )  # fmt: skip
    return next(gone, None) if waits else None


def _needs_all(slot: Slot) -> bool:
    """Return whether a rank trains in a Session, or waits for all ranks to make the group."""
    makes_group = bool(slot.marks.group_began) and not slot.marks.group_ended
    return makes_group or slot.session_stage is SessionStage.OPEN


def left_unsaved(slots: Iterable[Slot]) -> str:
    """Return one line on what finished workers did not save; empty if they saved everything."""
    left = next((slot for slot in slots if slot.session_stage is SessionStage.LEFT), None)
    if left is None or left.finished <= max(0, left.saved_step):
        return ""
    newest = f"of step {left.saved_step}" if left.saved_step > 0 else "missing"
    return (
        f"rank {left.rank} left its Session by an exception after step {left.finished}, "
        f"unsaved: its newest checkpoint is {newest}"
    )


def end_kind(outcomes: Set[Outcome], *, cut_short: bool, not_begun: bool) -> EndKind:
    """Return how an incarnation ended on a node, from its ranks' outcomes; ``cut_short`` because of
    another node, ``not_begun`` if stopped before any rank had begun a step."""
    if outcomes == {Outcome.COMPLETED}:
        return EndKind.COMPLETED
    if outcomes <= {Outcome.STOPPED, Outcome.COMPLETED}:
        return EndKind.STOPPED
    if cut_short:
        return EndKind.CUT_SHORT
    if not_begun or outcomes <= {Outcome.STOPPED_UNSAVED, Outcome.COMPLETED}:
        return EndKind.NOT_BEGUN
    return EndKind.CRASHED


def merge(verdicts: list[Ended], lost: tuple[str, ...] = ()) -> Ended:
    """Return how an incarnation ended on all nodes together.

    A lost node explains the other nodes' failures. Otherwise the node that crashed first is the
    cause; a killed worker comes before one with an exit code, which others can bring about, and one
    that says so itself comes last: the nodes' clocks may differ.

    Args:
        verdicts: of the nodes that reported, the head's first: its clock counts.
        lost: names of the other nodes; those that left during the incarnation are added.
    """
    own = verdicts[0]
    lost += tuple(name for one in verdicts for name in one.lost if name not in lost)
    crashed = [one for one in verdicts if one.kind is EndKind.CRASHED]
    cause = min(crashed, key=_order, default=own)
    rank, exit_code, message, tail = cause.rank, cause.exit_code, cause.message, cause.tail
    node = cause.node if crashed and not lost else ""
    if lost:
        rank, exit_code, message, tail = -1, 0, f"lost node {', '.join(lost)}", ()
    return msgspec.structs.replace(
        own,
        kind=_kind({one.kind for one in verdicts}, bool(lost)),
        rank=rank,
        exit_code=exit_code,
        message=message,
        stepped=any(one.stepped for one in verdicts),
        steps=max(one.steps for one in verdicts),
        finished=max(one.finished for one in verdicts),
        lived=cause.lived,
        attached=any(one.attached for one in verdicts),
        sealed=all(one.sealed for one in verdicts),
        out_of_memory=cause.out_of_memory,
        lost=lost,
        tail=tail,
        node=node,
    )


def _order(crashed: Ended) -> tuple[bool, bool, float]:
    of_another = any(words in crashed.message for words in OF_ANOTHER)
    return crashed.exit_code >= 0, of_another, crashed.failed_wall


def _kind(kinds: set[EndKind], any_lost: bool) -> EndKind:
    if any_lost or kinds & {EndKind.CRASHED, EndKind.CUT_SHORT}:
        return EndKind.CRASHED
    if kinds == {EndKind.COMPLETED}:
        return EndKind.COMPLETED
    return EndKind.NOT_BEGUN if EndKind.NOT_BEGUN in kinds else EndKind.STOPPED
