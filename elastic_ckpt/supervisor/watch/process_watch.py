"""Finds an agent or a worker that is stopped or a zombie; continues it or kills it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Final

from elastic_ckpt.policy.process_state import STOPPED, ProcessStates, Remedy
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome
from elastic_ckpt.supervisor.ports import Clock, HostPort
from elastic_ckpt.util.journald import warning

POLL_SECONDS: Final = 1.0

AWAY_SECONDS: Final = 5.0
"""Between two polls, of which there are four a second: this process was stopped meanwhile, and so
were the workers, as when SLURM suspends a job or a shell does on Ctrl-Z."""


class ProcessWatch:
    """Watches one node's processes; the supervisor's loop calls :meth:`poll` at each turn.

    Attributes:
        suspended: the job is suspended as a whole, or a debugger holds a worker.
    """

    def __init__(
        self, board: Board, host: HostPort, clock: Clock, say: Callable[[str], None]
    ) -> None:
        self._board = board
        self._host = host
        self._clock = clock
        self._say = say
        self.begin()

    def begin(self) -> None:
        """Start watching another incarnation."""
        self._states = ProcessStates()
        self._polled = self._clock.monotonic()
        self.suspended = False

    def poll(self, agent: int, *, urgent: bool) -> None:
        """Look at each process once a second; does not wait.

        Args:
            agent: its pid; 0 for none.
            urgent: the job has to be saved before a deadline.
        """
        now = self._clock.monotonic()
        if now - self._polled < POLL_SECONDS:
            return
        if now - self._polled > AWAY_SECONDS:
            self._states.forget()
        self._polled = now
        slots = [one for one in self._board.read_slots() if one.outcome is Outcome.NONE]
        ranks = {slot.pid: slot for slot in slots if slot.pid}
        states = self._host.process_states({agent, *ranks} - {0})
        due = self._states.judge(states, now, urgent=urgent)
        if self._states.suspended and not self.suspended:
            self._say("the job is suspended from outside: waiting until it continues")
        self.suspended = self._states.suspended
        for pid, remedy in due.items():
            rank = ranks[pid].rank if pid in ranks else -1
            who = f"rank {rank}" if rank >= 0 else "the agent"
            how = "is stopped (SIGSTOP)" if states[pid] == STOPPED else "is a zombie"
            if remedy is Remedy.CONTINUE:
                self._say(
                    warning(f"{who} (pid {pid}) {how}: continuing it, as the others wait for it")
                )
                self._host.send(pid, signal.SIGCONT)
                continue
            self._say(warning(f"{who} (pid {pid}) {how}: killing it"))
            if rank >= 0 and states[pid] == STOPPED:  # it cannot post this by itself
                slot = self._board.rank_slot(ranks[pid].local_rank)
                slot.leave(Outcome.FAILED, -int(signal.SIGSTOP), "stopped again by SIGSTOP")
            self._host.send(pid, signal.SIGKILL)
