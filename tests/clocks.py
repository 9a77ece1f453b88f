"""A time of day that steps while processes run; what is monotonic stays. Needs a C compiler."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).parent / "stepped_clock.c"


def why_not() -> str:
    """Return why clocks cannot be stepped here; empty if they can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    return "" if shutil.which("cc") else "no C compiler"


class SteppedClock:
    """The time of day of the processes that are started with its variables.

    Args:
        place: a directory for the library, and for a file that holds the step.
    """

    def __init__(self, place: Path, name: str) -> None:
        self._step = place / f"clock-{name}"
        self._step.write_bytes(bytes(8))
        self.seconds = 0.0
        library = _build(place)
        self.variables = [f"STEPPED_CLOCK={self._step}", f"LD_PRELOAD={library}"]

    def step(self, seconds: float) -> None:
        """Move it, against what it shows now."""
        self.seconds += seconds
        with open(self._step, "r+b", buffering=0) as file:  # in place: processes have it mapped
            file.write(int(self.seconds * 1e9).to_bytes(8, sys.byteorder, signed=True))


@functools.cache
def _build(place: Path) -> Path:
    library = place / "stepped_clock.so"
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library
