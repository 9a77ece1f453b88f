"""How an incarnation ended on this node: pure functions of what its workers left on the board."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.policy.failure import LAUNCH_FAILED
from elastic_ckpt.protocol.ended import Ended, EndKind, left_unsaved
from elastic_ckpt.protocol.slot import Outcome, SessionStage, Slot

BY_OTHERS: Final = ", by the kernel (out of memory?) or somebody (see dmesg)"
"""After the message of a worker that got SIGKILL, and not from its agent."""


def summarize(number: int, kind: EndKind, slots: Sequence[Slot]) -> Ended:
    """Return an incarnation's end without its cause and times."""
    stepped = [slot for slot in slots if slot.first_entry]
    attached = [slot for slot in slots if slot.attached]
    return Ended(
        incarnation=number,
        kind=kind,
        stepped=bool(stepped),
        steps=max((slot.finished - slot.start_step for slot in stepped), default=0),
        finished=max((slot.shown_step for slot in attached), default=0),
        attached=bool(attached),
        sealed=all(slot.session_stage is SessionStage.SEALED for slot in slots),
        message=left_unsaved(slots) if kind is EndKind.COMPLETED else "",
    )


def explain(failed: Slot, status: int | None, failure: Any) -> tuple[int, str]:
    """Return the exit code and one line for a failed worker; exit codes below 0 are signals. Its
    exit ``status`` and torch elastic's record of its ``failure`` are None if unknown."""
    if failed.outcome is Outcome.FAILED:
        return failed.exit_code, failed.reason or f"exit code {failed.exit_code}"
    if failed.outcome is Outcome.COMPLETED:
        return 0, "it exited with code 0 and closed no Session, while other ranks wait for it"
    if status is None and failure is not None:
        status = int(failure.exitcode)
    if status is None or status == 255:  # 255: the template died before it reported the status
        status = -int(signal.SIGKILL)
    if status == 0:
        return 0, f"it exited with code 0 inside an open Session, after step {failed.finished}"
    return status, (_recorded(failure) if status > 0 else "") or exit_text(status)


def ended_before(failed: Slot, slots: Sequence[Slot]) -> str:
    """Return words on a rank that ended with code 0 before this one failed, as it may be the cause:
    the others lose their connection to it. Empty if there is none, or its Session was done."""
    early = (
        slot for slot in slots
        if slot.outcome is Outcome.COMPLETED and slot.left < failed.left
        and slot.session_stage is not SessionStage.SEALED
    )  # fmt: skip
    first = min(early, key=lambda slot: slot.left, default=None)
    return f"; rank {first.rank} had ended with code 0 before" if first is not None else ""


def launch_failed(error: BaseException) -> tuple[int, str]:
    """Return the exit code and one line for workers that could not be launched.

    Returns:
        70, which is not retried; 0, which is, if a process that launches them was lost.
    """
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    lost = isinstance(error, EOFError | ConnectionError) or type(error).__name__.startswith("Dist")
    return (0 if lost else int(ExitCode.FAILED)), f"{LAUNCH_FAILED}: {what}"


def in_background(ended: Ended, pid: int) -> Ended:
    """Return the end of a script that left a copy of itself running, which is a wrong use: whether
    the copy trains, or only finishes work that is done, cannot be known."""
    message = (
        f"the script ended and left a copy of itself in the background, process {pid}, which was "
        "ended too: if that trains, start it in the foreground, without its daemon option; if it "
        "finishes work, as an upload does, wait for it before the script ends"
    )
    return msgspec.structs.replace(
        ended, kind=EndKind.CRASHED, exit_code=int(ExitCode.USAGE), message=message
    )


@dataclass(frozen=True)
class StuckWorker:
    """A worker that SIGKILL did not end; ``state`` is the letter in /proc."""

    rank: int
    pid: int
    state: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid}, state {self.state or 'unknown'})"


def still_there(ended: Ended, stuck: StuckWorker, seconds: float) -> Ended:
    """Return the end of workers of which one does not go: others cannot have its GPU and files."""
    message = (
        f"{LAUNCH_FAILED}: {stuck} is still there {seconds:.0f} s after SIGKILL, with its GPU "
        "memory and files: repair the disk or device that it waits for, or restart this machine, "
        "then rerun the same command"
    )
    return msgspec.structs.replace(
        ended, kind=EndKind.CRASHED, rank=-1, exit_code=int(ExitCode.FAILED), message=message
    )


def lived_seconds(failed: Slot, failed_at: int) -> float:
    """Return how long a worker ran until it failed; 0 if unknown."""
    return max(0.0, (failed_at - failed.marks.entered) / 1e9) if failed.marks.entered else 0.0


def exit_text(status: int | None) -> str:
    """Return an exit status in words."""
    if status is None:
        return "exit status unknown"
    return f"killed by {signal_name(-status)}" if status < 0 else f"exit code {status}"


def signal_name(number: int) -> str:
    """Return a signal's name; of one without a name its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _recorded(failure: Any) -> str:
    """Return the first line of an exception that a worker raised before its script."""
    record = getattr(failure, "error_file_data", {}).get("message", {})
    text = record.get("message", "") if isinstance(record, dict) else ""
    lines = str(text).strip().splitlines()
    return lines[0] if lines else ""
