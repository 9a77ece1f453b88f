"""A process that saves checkpoints without torch, made for being traced.

The farm imports everything and saves once, then forks a child per case. The child stops itself
before its act, so that a tracer sees the act and nothing else; and a case costs milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_ckpt.checkpoint.cleanup import recover as recover_attempts
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME
from elastic_ckpt.errors import ElasticCkptError
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import FILES, make_checkpoint, open_job

OLD, NEW, NEXT = 10, 20, 30
"""Steps: of the checkpoint that stands before, of the traced save, of the one after it."""

FAILED = 3
"""Exit code after an error that was reported in one line."""

PATIENCE = 60.0
"""Bound of every wait for another process, in seconds; never a measure of speed."""

REPOSITORY = Path(__file__).parents[2]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PTRACER = 0x59616D61


def contents(step: int) -> dict[str, bytes]:
    """Return rank 0's files of a step, with other bytes and sizes at each step."""
    return {name: data + b"step %d" % step * step for name, data in FILES.items()}


def save(root: Path, step: int = NEW) -> None:
    """Write both ranks' parts, one after the other, and the seal."""
    # Not open_job: a save finds a directory that was prepared long ago.
    make_checkpoint(JobDirectory.at(root), step, contents=contents(step), durable=True)


def recover(root: Path) -> None:
    """Clean up as the holder of the lock does at its start."""
    recover_attempts(JobDirectory.at(root))


def careless(root: Path) -> None:
    """Delete the previous checkpoint before saving, which the checks must detect."""
    (JobDirectory.at(root).checkpoint(0, OLD) / MANIFEST_NAME).unlink(missing_ok=True)
    save(root)


ACTS: dict[str, Callable[[Path], None]] = {"save": save, "recover": recover, "careless": careless}


# -- in the farm --------------------------------------------------------------------------------


def farm() -> None:
    """Serve orders until the input ends."""
    serve(_warm, _start)


def serve(warm: Callable[[Path], None], start: Callable[..., int]) -> None:
    """Serve orders, one line of JSON each, until the input ends.

    ``warm`` is called once, in this process; ``start`` forks a child and returns its pid.
    """
    libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, int] = {}
        if "warm" in order:
            warm(Path(order["warm"]))
        elif "stopped" in order:
            status = os.waitpid(order["stopped"], os.WUNTRACED)[1]
            answer["stopped"] = int(os.WIFSTOPPED(status))
        elif "wait" in order:
            status = os.waitpid(order["wait"], 0)[1]
            answer["code"] = os.waitstatus_to_exitcode(status)
        else:
            answer["pid"] = start(**order)
        print(json.dumps(answer), flush=True)


def fork(printed: str, act: Callable[[], int]) -> int:
    """Fork a child that runs one act and exits with its result."""
    library, parent = libc(), os.getpid()
    pid = os.fork()
    if pid == 0:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        library.prctl(_PR_SET_PTRACER, -1, 0, 0, 0)  # any process: the tracer is not an ancestor
        if os.getppid() != parent:
            os._exit(1)
        out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            os._exit(act())
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    return pid


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _warm(root: Path) -> None:
    """Import late imports now, so that children open only the save's files."""
    open_job(root)
    for act in ACTS.values():
        act(root)


def _start(act: str, root: str, printed: str) -> int:
    pid = fork(printed, lambda: _act(ACTS[act], Path(root)))
    os.waitpid(pid, os.WUNTRACED)
    return pid


def _act(act: Callable[[Path], None], root: Path) -> int:
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        act(root)
    except (OSError, ElasticCkptError) as error:
        # Not by a write, which may be what fails from now on.
        os.writev(2, [f"FAILED: {error}\n".encode()])
        return FAILED
    return 0


# -- in the test --------------------------------------------------------------------------------


class Farm:
    """The farm, from a test's side; every wait for it is bounded."""

    def __init__(self, scratch: Path, module: str = "tests.faults.store_writer") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self._process.pid
        try:
            self.ask(warm=str(scratch / "warm"))
        except BaseException:
            self.close()
            raise

    def start(self, act: str, root: Path, printed: Path) -> int:
        """Start a child that stops itself before its act."""
        return int(self.ask(act=act, root=str(root), printed=str(printed))["pid"])

    def wait(self, pid: int, seconds: float = PATIENCE) -> int:
        """Return its exit code, negative for a signal; kill it if it takes too long."""
        self._send(wait=pid)
        try:
            return int(self._receive(seconds)["code"])
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            self._receive(PATIENCE)
            raise

    def children(self) -> list[int]:
        """Return the pids of running processes that the farm has started or inherited."""
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def close(self) -> None:
        """End it; its children end with it."""
        self._process.kill()
        self._process.communicate()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and wait for the answer."""
        self._send(**order)
        return self._receive(PATIENCE)

    def _send(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        printed, limit = b"", time.monotonic() + seconds
        while not printed.endswith(b"\n"):
            left = max(0.0, limit - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError(f"no answer within {seconds:.0f} s")
            more = os.read(self._process.stdout.fileno(), 4096)
            if not more:
                raise EOFError("the farm has ended")
            printed += more
        return dict(json.loads(printed))


if __name__ == "__main__":
    farm()
