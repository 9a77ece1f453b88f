"""Prints the live page of a job: the process that ``run --web`` starts for each rendering."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Final

from elastic_ckpt.cli.report.command import uncollected
from elastic_ckpt.cli.report.material import collect
from elastic_ckpt.cli.report.page import render
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.supervisor.web.renderer import RENDER_SECONDS
from elastic_ckpt.util.processes import die_with_parent

_NICE: Final = 5


def main() -> None:
    """Print the page of the job in the directory that is the only argument."""
    die_with_parent()
    signal.alarm(int(RENDER_SECONDS) + 1)  # should its parent be stopped
    os.nice(_NICE)  # training comes first
    with contextlib.suppress(OSError):  # and if memory is short, this process goes
        Path("/proc/self/oom_score_adj").write_text("1000")
    with uncollected():
        page = render(collect(JobDirectory.at(Path(sys.argv[1]))), is_live=True)
    sys.stdout.write(f"{page}\n")
