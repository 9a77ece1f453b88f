"""Reports a turn of the loop to those that watch this process: heartbeat and service manager."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.supervisor.saves.forecast import step_seconds

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.supervisor import Supervisor


def report_turn(run: Supervisor) -> None:
    """Beat, and report to systemd, which waits for a save as long as it makes progress."""
    now, service, board = run.now, run.ports.service, run.ports.board
    run.ports.host.turn(run.agent.pid if run.agent else 0)
    service.serve(now, run.state, run.record.node.message)
    if run.state is RunState.DRAINING and service.is_there:
        slots = board.read_slots()
        active = run.ports.host.activity(slot.pid for slot in slots)
        step = max((step_seconds(slot) for slot in slots), default=0.0)
        service.stopping(now, (tuple(slot.beat for slot in slots), active), step)
