"""How an incarnation ended on this node: pure functions of what its workers left on the board."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.slot import Outcome, Slot


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
    )


def explain(failed: Slot, status: int | None, failure: Any) -> tuple[int, str]:
    """Return the exit code and one line for a failed worker; exit codes below 0 are signals. Its
    exit ``status`` and torch elastic's record of its ``failure`` are None if unknown."""
    if failed.outcome is Outcome.FAILED:
        return failed.exit_code, failed.reason or f"exit code {failed.exit_code}"
    if status is None and failure is not None:
        status = int(failure.exitcode)
    if status is None or status == 255:  # 255: the template died before it reported the status
        status = -int(signal.SIGKILL)
    if status == 0:
        return 0, "it exited with code 0 before the end of the script"
    return status, (_recorded(failure) if status > 0 else "") or exit_text(status)


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
