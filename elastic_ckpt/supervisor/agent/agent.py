"""The agent: the supervisor's child that hosts torch elastic and so launches the workers.

Torch elastic runs in a thread, one ``elastic_launch`` per incarnation. The main thread serves the
supervisor's commands, watches the workers' processes and is the watcher of the stop-step
agreement; it depends on no rank's progress. When the supervisor dies its pipe closes, and the
agent kills everything below itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.process_log import ProcessLog
from elastic_ckpt.protocol.agreement import NOTHING_ENTERED, RequestAnswer, RequestKind
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.cluster import NodeAnswer
from elastic_ckpt.protocol.ended import Ended, EndKind, end_kind
from elastic_ckpt.protocol.messages import (
    AgentEvent,
    Ask,
    Command,
    Kill,
    Launch,
    LineReader,
    Move,
    Ready,
    encode_line,
)
from elastic_ckpt.protocol.worker_spec import WorkerSpec, decode_spec
from elastic_ckpt.supervisor.agent import launch
from elastic_ckpt.supervisor.agent.cluster_member import Membership
from elastic_ckpt.supervisor.agent.hub_link import HubNetwork
from elastic_ckpt.supervisor.agent.launch import ElasticLaunch, NodeRank
from elastic_ckpt.supervisor.agent.output import Output
from elastic_ckpt.supervisor.agent.template_process import Template
from elastic_ckpt.supervisor.agent.verdict import (
    ended_before,
    in_background,
    launch_failed,
    lived_seconds,
    still_there,
    summarize,
)
from elastic_ckpt.supervisor.agent.watcher import Watcher
from elastic_ckpt.supervisor.agent.workers import STUCK_SECONDS, Workers
from elastic_ckpt.util.processes import (
    become_subreaper,
    count_memory_kills,
    die_with_parent,
    kill_descendants,
    outlive_parent,
)

log = logging.getLogger(__name__)

UNLAUNCHED_SECONDS: Final = 1.0
"""Workers of an incarnation cut short that start later than this count as never started."""

JOIN_SECONDS: Final = 1.0
"""How long to wait for torch elastic's thread, which has nothing left to do."""

SPEC_SECONDS: Final = 30.0
"""How long to wait for the supervisor's first line."""

_IGNORED: Final = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip


class Agent:
    """The main thread's loop; implements :class:`~.member_ports.LocalWorkers`."""

    def __init__(
        self,
        spec: WorkerSpec,
        commands: LineReader,
        events: int,
        template: Template,
        sockets: socket.socket,
    ) -> None:
        """``events`` is the descriptor that events are written to; ``sockets`` receives those of a
        node that becomes the head."""
        self._spec = spec
        self._sockets = sockets
        self._commands = commands
        self._events = events
        self._template = template
        self._board = Board.open(spec.board)
        job = JobDirectory(Path(spec.directory))
        self.log = ProcessLog.of_node(job, "agent", spec.node, self._log_fields).begin()
        log.info("begins: %d workers of %s", spec.nproc, spec.script)
        self._output = Output(job, self._board, Path(spec.output))
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._selector.register(commands.fd, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._launch: ElasticLaunch | None = None
        self._watcher = Watcher(self._board)
        self._workers = Workers(self._board, self._selector)
        self._not_begun = False
        self._cut_short_at = 0.0
        self._memory_kills = 0
        self._next: WorkerSpec | None = None  # to go on with, once no worker runs
        self._nodes = self._member(spec)

    def _member(self, spec: WorkerSpec) -> Membership | None:
        place, network = spec.rendezvous, HubNetwork(self._wake)
        return Membership(spec, place, self, self._send, network) if place else None

    def run(self) -> None:
        """Serve until the supervisor is gone."""
        self._send(Ready())
        while not self._commands.closed:
            self._selector.select(self._patience())
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
            for line in self._commands.lines():
                self._obey(msgspec.json.decode(line, type=Command))
            if self._next is not None:
                self._move(self._next)
            elif self._nodes is not None:
                self._nodes.serve()
            if self._launch is None:
                continue
            self._workers.watch()
            if self._is_over(self._launch):
                self._finish(self._launch)

    def _patience(self) -> float | None:
        patience = self._workers.patience() if self._launch is not None else None
        if self._nodes is None:
            return patience
        nodes = self._nodes.patience()
        return nodes if patience is None else min(nodes, patience)

    def _log_fields(self) -> dict[str, int]:
        return {"incarnation": self._board.incarnation}

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def _send(self, event: AgentEvent) -> None:
        # The end of its commands shows that the supervisor is gone.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._events, encode_line(event))

    # -- commands ---------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        if isinstance(command, Move):
            self._next = received(command.spec, self._sockets)
        elif self._nodes is not None:
            self._nodes.obey(command)
        elif isinstance(command, Launch):
            self.begin(NodeRank.alone(command.incarnation, command.arguments))
        elif isinstance(command, Ask):
            self._ask(command.kind)
        if isinstance(command, Kill):
            self._workers.kill(hung=command.hung)

    def _move(self, spec: WorkerSpec) -> None:
        """Take the place that this node has from now on, once the workers are gone."""
        if self._nodes is not None:
            self._nodes.leave()
        if self._launch is not None:
            self.cut_short()
            return
        self._next = None
        self._spec = msgspec.structs.replace(spec, output=self._spec.output)
        self._nodes = self._member(self._spec)
        log.info("goes on, with the head at %s", spec.rendezvous)
        self._send(Ready())

    def _ask(self, kind: RequestKind) -> None:
        asks_itself = self._spec.saves_itself and not self._takes_part
        if self._launch is not None and asks_itself and kind is not RequestKind.STOP:
            self._workers.ask_to_save(self._spec.on_notice)
            return  # no rank would see the flag, which must not keep the next request waiting
        asked = self._watcher.ask(kind) if self._launch is not None else None
        if asked is not None:
            answer, idle = asked
            self._posted(answer, idle=idle)

    # -- this node's workers: see member_ports.py ---------------------------

    def begin(self, node_rank: NodeRank) -> None:
        number = node_rank.number
        self._board.begin_incarnation(number)
        self._not_begun = False
        self._cut_short_at = 0.0
        self._memory_kills = count_memory_kills()
        log.info("launching incarnation %d: node %d of %d", number, node_rank.node, node_rank.nodes)
        self._template.ensure_running()
        self._launch = ElasticLaunch(node_rank, self._spec, self._wake_write)
        self._launch.start()

    def flag(self, number: int) -> NodeAnswer:
        return self._watcher.flag(number)

    def post(self, answer: RequestAnswer, *, idle: bool) -> None:
        self._board.post_answer(answer)
        self._posted(answer, idle=idle)

    def _posted(self, answer: RequestAnswer, *, idle: bool) -> None:
        """End the workers if ``idle``.

        While the flag is up no rank begins a step. If none has begun one in this incarnation, the
        newest checkpoint is as good as a new one; a script that does not take part gets SIGTERM.
        """
        where = "where they start" if answer.step == NOTHING_ENTERED else f"at step {answer.step}"
        log.info("request %d: %s %s", answer.number, answer.kind.name, where)
        if not idle:
            return
        self._not_begun = True
        if self._takes_part or answer.step != NOTHING_ENTERED:
            self._workers.kill()
        else:
            self._workers.ask_to_save(self._spec.on_notice)

    @property
    def _takes_part(self) -> bool:
        """Whether a rank takes part in the agreement: it has a Session, or calls should_save."""
        return any(slot.attached for slot in self._board.read_slots())

    def cut_short(self) -> None:
        if self._launch is not None and not self._cut_short_at:
            if self._workers.failed_at:
                return  # they failed by themselves
            log.info("ending the workers because of another node")
            self._cut_short_at = time.monotonic()
            self._board.abort(self._board.flag)
        if self._cut_short_at:
            self._workers.kill()

    @property
    def is_warm(self) -> bool:
        return self._template.is_warm

    @property
    def busy(self) -> bool:
        return self._launch is not None

    @property
    def flagged(self) -> int:
        return self._board.flag

    @property
    def answered(self) -> int:
        return max(self._board.answers(), default=0)

    @property
    def seen(self) -> int:
        return min((slot.seen for slot in self._board.read_slots()), default=0)

    # -- the end of an incarnation ------------------------------------------------------------

    def _is_over(self, started: ElasticLaunch) -> bool:
        """Whether all workers are gone.

        Torch elastic may return much later or never: it waits for nodes that did not come, at the
        end for those that are not done, and for the return value of a worker that had none.
        """
        if self._workers.stuck():
            return True
        if started.over or self._workers.long_gone:
            return True
        if self._nodes is not None and self._workers.left_well:
            return True
        late = self._cut_short_at and time.monotonic() > self._cut_short_at + UNLAUNCHED_SECONDS
        return bool(late) and not self._workers.any_left

    def _finish(self, finished: ElasticLaunch) -> None:
        if not finished.over:
            finished.abandon()
        # Between nodes it may wait for the others a while longer, in a thread of its own.
        finished.join(0.0 if self._nodes is not None and not finished.over else JOIN_SECONDS)
        self._launch = None
        now = time.monotonic_ns()
        failed_at, noticed_at = self._workers.failed_at or now, self._workers.noticed_at or now
        verdict, stuck = self._verdict(finished), self._workers.stuck()
        if stuck and verdict.kind in (EndKind.CRASHED, EndKind.CUT_SHORT):
            verdict = still_there(verdict, stuck[0], STUCK_SECONDS)
        shown = f"{verdict.kind.value}, {verdict.what}" if verdict.what else verdict.kind.value
        log.info("incarnation %d is over: %s", verdict.incarnation, shown)
        self._workers.log_exits()
        self._board.end_incarnation()  # for workers that torch elastic has yet to start
        self._workers.sweep(self._template.pid)
        gone_at = time.monotonic_ns()
        self._output.flush()  # the run may end, and this process with it
        ended = msgspec.structs.replace(
            verdict,
            failed_at=failed_at,
            noticed_at=noticed_at,
            gone_at=gone_at,
            failed_wall=time.time() - (gone_at - failed_at) / 1e9,
        )
        if self._nodes is None:
            self._send(ended)
        else:
            self._nodes.ended(ended)

    def _verdict(self, finished: ElasticLaunch) -> Ended:
        slots = self._board.read_slots()
        kind = end_kind(
            {slot.outcome for slot in slots},
            cut_short=bool(self._cut_short_at),
            not_begun=self._not_begun,
        )
        ended = msgspec.structs.replace(
            summarize(finished.number, kind, slots),
            out_of_memory=count_memory_kills() > self._memory_kills,
        )
        if kind is EndKind.COMPLETED and not ended.attached:
            pid = self._workers.in_background(self._template.pid)
            return in_background(ended, pid) if pid else ended
        if kind is not EndKind.CRASHED:
            return ended
        if finished.error is not None and not self._workers.failed_at:
            exit_code, message = launch_failed(finished.error)
            return msgspec.structs.replace(ended, exit_code=exit_code, message=message)
        failed = self._workers.first_failed(slots)
        exit_code, message = self._workers.explain(failed, finished.failures)
        return msgspec.structs.replace(
            ended,
            rank=failed.rank,
            exit_code=exit_code,
            message=message + ended_before(failed, slots),
            lived=lived_seconds(failed, self._workers.failed_at),
            tail=self._output.tail(failed.local_rank),
        )


def received(spec: WorkerSpec, sockets: socket.socket) -> WorkerSpec:
    """Return a specification with the socket of a node that leads, as this process has it."""
    if spec.rendezvous is None or not spec.rendezvous.leads:
        return spec
    _, fds, _, _ = socket.recv_fds(sockets, 1, 1)
    return msgspec.structs.replace(
        spec, rendezvous=msgspec.structs.replace(spec.rendezvous, listen_fd=fds[0])
    )


def _read_spec(commands: LineReader) -> WorkerSpec:
    limit = time.monotonic() + SPEC_SECONDS
    while time.monotonic() < limit and not commands.closed:
        for line in commands.lines():
            return decode_spec(line)
        time.sleep(0.005)
    raise SystemExit("elastic-ckpt agent: the supervisor sent no specification")


def main() -> None:
    """Run the agent: commands come on standard input, events go to ELASTIC_CKPT_EVENTS."""
    die_with_parent()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    commands = LineReader(os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    # Torch elastic and multiprocessing leave directories behind; the supervisor removes this one.
    tempfile.tempdir = scratch = os.environ.pop("ELASTIC_CKPT_SCRATCH")
    events = int(os.environ.pop("ELASTIC_CKPT_EVENTS"))
    os.set_inheritable(events, False)
    sockets = socket.socket(fileno=int(os.environ.pop("ELASTIC_CKPT_SOCKETS")))
    sockets.set_inheritable(False)
    become_subreaper()
    spec = msgspec.structs.replace(_read_spec(commands), output=scratch)
    template = Template(spec.preload)
    agent = Agent(spec, commands, events, template, sockets)
    template.ensure_running()
    launch.prepare()  # while the template imports, too
    outlive_parent()
    try:
        agent.run()
        log.info("the supervisor is gone")
    except BaseException:
        log.exception("the agent failed")
        raise
    finally:
        kill_descendants(spare_trackers=True)
        shutil.rmtree(scratch, ignore_errors=True)  # the supervisor may be gone
        sys.stdout.flush()
        agent.log.end()
        os._exit(0)  # torch elastic's thread may still wait for workers that are gone
