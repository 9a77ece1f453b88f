"""The bar on a terminal, nothing elsewhere, and nothing for short work."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading

import pytest

SCRIPT = """
import sys, time

late = float(sys.argv[1])
real = time.monotonic
began = real() + 3600
time.monotonic = lambda: real() + (late if real() > began + 0.05 else 0.0)
from elastic_ckpt.cli.progress import progress_bar as bars

began = real()
with bars.progress_bar() as watch:
    for name, total in (("verifying first", 3000), ("verifying nothing", 0), ("second", 2000)):
        advance = watch(name, total)
        for _ in range(total // 1000):
            time.sleep(0.06)
            advance(1000)
        advance(0)
print("done", file=sys.stderr)
"""


def on_terminal(late: float) -> tuple[int, str]:
    """Run the script with a pseudo-terminal for its standard error."""
    ours, theirs = pty.openpty()
    said: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                said.append(data)
        except OSError:  # Linux raises this after the other side closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(late)], stderr=theirs, timeout=60, check=False,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )  # fmt: skip
    finally:
        os.close(theirs)
        reader.join(30)
        os.close(ours)
    return done.returncode, b"".join(said).decode()


def test_a_terminal_shows_a_bar_and_clears_it() -> None:
    code, said = on_terminal(10.0)
    assert code == 0
    assert "verifying first" in said and "\x1b[" in said and "%" in said
    assert "done" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_short_work_shows_no_bar() -> None:
    assert on_terminal(0.0) == (0, "done\r\n")


@pytest.mark.parametrize("late", [0.0, 10.0])
def test_other_outputs_get_nothing(late: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(late)], stderr=subprocess.PIPE, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert done.stderr == "done\n"
