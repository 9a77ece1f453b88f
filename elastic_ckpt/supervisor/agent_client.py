"""The supervisor's side of the agent: starts it, exchanges messages with it, ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.protocol.messages import (
    AgentEvent,
    Command,
    LineReader,
    Move,
    Ready,
    encode_line,
)
from elastic_ckpt.protocol.worker_spec import WorkerSpec
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.util.processes import KILL_WAIT_SECONDS, environment_of, kill_descendants

log = logging.getLogger(__name__)

# The working directory must not shadow the packages that the agent imports.
_CODE = (
    "import sys; sys.path[:1] = []; from elastic_ckpt.supervisor.agent.agent import main; main()"
)

_LONGEST_TMPDIR: Final = 60
"""Multiprocessing binds a socket whose path is 47 characters longer; the kernel allows 107."""


_PREFIX: Final = "eckpt-"
_OWNER: Final = "supervisor.json"
_LISTENERS: Final = "pymp-*/listener-*"
"""Sockets at which the template is asked for workers; multiprocessing names them."""


def _make_scratch() -> str:
    """Create a directory for the agent's sockets and FIFOs, removed with the agent."""
    base = tempfile.gettempdir()
    place = Path(base if len(os.fsencode(base)) <= _LONGEST_TMPDIR else "/tmp")
    _sweep(place)
    made = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
    (Path(made) / _OWNER).write_bytes(msgspec.json.encode(ProcessIdentity.current()))
    return made


def _sweep(place: Path) -> None:
    """Remove directories of this user's runs whose supervisor and agent were both killed."""
    for path in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            data = read_bounded(path / _OWNER, 4096)
            if msgspec.json.decode(data, type=ProcessIdentity).is_alive() is False:
                shutil.rmtree(path, ignore_errors=True)


def _listening(spec: WorkerSpec) -> tuple[int, ...]:
    """Return the descriptor of the socket that the job's hub listens on, if this node leads."""
    rendezvous = spec.rendezvous
    return (rendezvous.listen_fd,) if rendezvous is not None and rendezvous.leads else ()


_UNLOGGED: Final = ("tail", "terms", "spec")
"""Fields with the workers' output and the script's arguments, which may hold secrets."""


def summary(message: msgspec.Struct) -> str:
    """Return a message for the log without default values: ``Ask kind=STOP leaving=True``."""
    parts = [type(message).__name__]
    for field in msgspec.structs.fields(message):
        value = getattr(message, field.name)
        if field.name not in _UNLOGGED and value != field.default:
            parts.append(f"{field.name}={getattr(value, 'name', value)}")
    return " ".join(parts)


class AgentProcess:
    """The real ``AgentPort``: an agent process."""

    def __init__(self, spec: WorkerSpec, python: str, variables: Mapping[str, str]) -> None:
        """Start it.

        Args:
            python: the interpreter of the agent and the workers; empty for this one.
            variables: the workers', in place of the environment's; the agent has them too, because
                some count only from the start of an interpreter or of torch.
        """
        read, write = os.pipe()
        environment = environment_of(python, os.environ) | dict(variables)
        environment["ELASTIC_CKPT_EVENTS"] = str(write)
        environment["ELASTIC_CKPT_DIR"] = spec.directory
        self._scratch = _make_scratch()
        self._listeners: set[Path] = set()
        environment["ELASTIC_CKPT_SCRATCH"] = self._scratch
        self._sockets, theirs = socket.socketpair()
        environment["ELASTIC_CKPT_SOCKETS"] = str(theirs.fileno())
        if spec.nproc > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
        self._process = subprocess.Popen(
            [python or sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            pass_fds=(write, theirs.fileno(), *_listening(spec)),
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal is for the supervisor only
        )
        os.close(write)
        theirs.close()
        self._moves = False
        self.pid = self._process.pid
        self._events = LineReader(read)
        self.fd = read
        self.interval_steps = spec.save_interval_steps  # as the ranks received it
        log.info("agent started: pid %d", self.pid)
        self.send_raw(encode_line(spec))

    def send(self, command: Command) -> None:
        log.info("to the agent: %s", summary(command))
        self.send_raw(encode_line(command))

    def send_raw(self, line: bytes) -> None:
        """Write one line; ``gone`` shows an agent that died."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(line)
                self._process.stdin.flush()

    def move(self, spec: WorkerSpec) -> None:
        """Give it another place in the job. What it reports before it has taken that is ignored;
        its :class:`Ready` is the next event."""
        self._moves = True
        self.interval_steps = spec.save_interval_steps
        with contextlib.suppress(OSError):
            for fd in _listening(spec):
                socket.send_fds(self._sockets, [b"."], [fd])
        self.send(Move(spec))

    def events(self) -> Iterator[AgentEvent]:
        for line in self._events.lines():
            event: AgentEvent = msgspec.json.decode(line, type=AgentEvent)
            log.info("from the agent: %s", summary(event))
            self._moves = self._moves and not isinstance(event, Ready)
            if not self._moves:
                yield event

    @property
    def gone(self) -> bool:
        return self._events.closed

    @property
    def is_intact(self) -> bool:
        found = set(Path(self._scratch).glob(_LISTENERS))
        self._listeners |= found
        return found == self._listeners

    def end(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a disk that hangs may block its end
            self._process.wait(KILL_WAIT_SECONDS)
        log.info("agent ended: pid %d", self.pid)
        kill_descendants()
        self._sockets.close()
        os.close(self.fd)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # a command that it did not read
                self._process.stdin.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
