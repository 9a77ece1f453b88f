"""What real processes do, as it is told apart from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from elastic_ckpt.policy.hang import Effort
from elastic_ckpt.supervisor.watch.effort import measure_effort

WAIT = "import time; time.sleep(60)"
SPIN = "while True: pass"


@pytest.mark.parametrize(
    ("script", "effort"),
    [
        (WAIT, Effort.IDLE),
        (SPIN, Effort.SPINNING),
        ("while True: bytearray(1 << 26)", Effort.WORKING),  # touches new memory
        ("f = open('/dev/zero', 'rb')\nwhile True: f.read(1 << 16)", Effort.WORKING),
        (
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])",
            Effort.WORKING,
        ),
    ],
)
def test_work_is_told_from_a_wait(script: str, effort: Effort) -> None:
    with subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{script}"],
                          stdout=subprocess.PIPE, start_new_session=True) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert measure_effort([process.pid]) is effort
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_process_that_is_gone_does_nothing() -> None:
    assert measure_effort([2**22 - 1]) is Effort.IDLE
