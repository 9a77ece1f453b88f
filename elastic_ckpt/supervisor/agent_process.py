"""The supervisor's end of the agent: start it, talk to it, take it down."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import msgspec

from elastic_ckpt.supervisor.messages import (
    AgentEvent,
    Command,
    LineReader,
    WorkerSpec,
    encode_line,
)
from elastic_ckpt.supervisor.processes import kill_descendants

# The working directory must not shadow the packages that the agent imports.
_CODE = "import sys; sys.path[:1] = []; from elastic_ckpt.supervisor.agent import main; main()"


class AgentProcess:
    """A running agent. Its ``fd`` becomes readable when it says something or ends."""

    def __init__(self, spec: WorkerSpec) -> None:
        read, write = os.pipe()
        environment = dict(os.environ, ELASTIC_CKPT_EVENTS=str(write))
        environment["ELASTIC_CKPT_DIR"] = spec.directory
        if spec.nproc > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            pass_fds=(write,),
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal is the supervisor's to hear
        )
        os.close(write)
        self._events = LineReader(read)
        self.fd = read
        self.send_raw(encode_line(spec))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, command: Command) -> None:
        """Ask the agent to do something; a dead one is noticed through ``events``."""
        self.send_raw(encode_line(command))

    def send_raw(self, line: bytes) -> None:
        """Write one line; a dead agent is noticed through ``events``."""
        if self._process.stdin is None:
            return
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            return

    def events(self) -> Iterator[AgentEvent]:
        """What the agent has said since the last call."""
        for line in self._events.lines():
            yield msgspec.json.decode(line, type=AgentEvent)

    @property
    def gone(self) -> bool:
        """Whether the agent's end of the pipe is closed: it has died."""
        return self._events.closed

    def end(self) -> None:
        """Take the agent and everything below the supervisor down; bounded."""
        self._process.kill()
        self._process.wait()
        kill_descendants()
        os.close(self.fd)
        if self._process.stdin is not None:
            self._process.stdin.close()
