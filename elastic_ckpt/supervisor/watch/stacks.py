"""What the workers are doing, as seen from outside by py-spy."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from elastic_ckpt.util.text import printable
from elastic_ckpt.util.versions import beside_python

DUMP_SECONDS: Final = 10.0
_MAX_FRAMES: Final = 40
_COLLECTIVE: Final = "torch/distributed/"
_CALLERS: Final = ("<frozen runpy>", "/runpy.py")
"""What runs the script; the second is Python 3.10's."""

_BACKWARD: Final = "_engine_run_backward"
"""DistributedDataParallel waits for the other ranks inside it."""


NO_PROGRAM: Final = "the program py-spy is missing: reinstall the package py-spy"


@dataclass(frozen=True)
class Stack:
    """The main thread of a worker, innermost frame first; or ``why`` it could not be read."""

    frames: tuple[str, ...] = ()
    why: str = ""

    @property
    def lines(self) -> list[str]:
        """The frames, or why there are none."""
        return [*self.frames, *[self.why] * bool(self.why)]

    @property
    def waits(self) -> bool:
        """Whether it is inside a collective, as far as Python's frames show."""
        return any(_COLLECTIVE in frame or _BACKWARD in frame for frame in self.frames)

    @property
    def own(self) -> str:
        """The innermost frame outside of libraries; empty if there is none."""
        return next((one for one in self.frames if "site-packages" not in one), "")


def dump_stacks(pids: Mapping[int, int]) -> dict[int, Stack]:
    """Return stacks by rank; bounded, also where a process cannot be stopped."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = {rank: pool.submit(_dump, pid) for rank, pid in pids.items()}
        return {rank: future.result() for rank, future in found.items()}


def _dump(pid: int) -> Stack:
    command = [beside_python("py-spy"), "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DUMP_SECONDS,
            check=False,
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            return Stack(why=f"no stack: {printable(said[-1] if said else 'py-spy failed', 300)}")
        threads = json.loads(done.stdout)
        main = next(one for one in threads if one.get("thread_name") == "MainThread")
        return Stack(tuple(_script_frames(main["frames"]))[:_MAX_FRAMES])
    except FileNotFoundError:
        return Stack(why=f"no stack: {NO_PROGRAM}")
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, StopIteration) as error:
        return Stack(why=f"no stack: {printable(str(error), 300) or type(error).__name__}")


def _script_frames(frames: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the script's frames and what it called; not what called the script."""
    for frame in frames:
        if frame["filename"].endswith(_CALLERS):
            return
        yield printable(f"{frame['name']} ({frame['filename']}:{frame['line']})", 300)
