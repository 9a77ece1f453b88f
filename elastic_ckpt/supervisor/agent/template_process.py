"""Starts the template, the process that workers are forked from: multiprocessing's forkserver."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from typing import Final

import psutil

from elastic_ckpt.supervisor.agent.launch import WARM_VARIABLE, WORKER_ENTRY
from elastic_ckpt.util.processes import is_resource_tracker

log = logging.getLogger(__name__)

_BASE: Final = (
    "elastic_ckpt.supervisor.agent.template",
    "elastic_ckpt.supervisor.agent.launch",
    WORKER_ENTRY,
    # All of ours that a worker may need: the package may be upgraded while the job runs.
    "elastic_ckpt.training.session",
    "elastic_ckpt.training.functions",
    "elastic_ckpt.training.place",
    "elastic_ckpt.training.data.sampler",
    "elastic_ckpt.training.data.stateful_sampler",
    "elastic_ckpt.training.engines.torch.engine",
    "torch._dynamo",  # making an optimizer imports it, which takes longer than torch itself
)
_COLOSSALAI: Final = "elastic_ckpt.training.engines.colossalai.engine"
_WARNINGS: Final = "PYTHONWARNINGS"
_LAST: Final = "elastic_ckpt.supervisor.agent.template_is_warm"

WARM_SECONDS: Final = 120.0
"""A template that has not said by then that it has imported everything is used as it is."""


class Template:
    """The template of one agent; ``pid`` is of the newest, -1 before the first."""

    def __init__(self, preload: Sequence[str]) -> None:
        """Have it import ``preload`` before workers are forked from it."""
        self.pid = -1
        self._preload = ", ".join(["torch", *preload])
        colossalai = [_COLOSSALAI] if "colossalai" in preload else []
        multiprocessing.set_forkserver_preload([*_BASE, *preload, *colossalai, _LAST])
        self._warm_read, warm_write = os.pipe()
        os.set_blocking(self._warm_read, False)
        self._is_warm, self._limit = False, time.monotonic() + WARM_SECONDS
        # The template inherits no descriptors but those of multiprocessing.
        os.environ[WARM_VARIABLE] = f"/proc/{os.getpid()}/fd/{warm_write}"
        # Killed workers leave semaphores behind; the tracker's warning about them is no news.
        before = os.environ.pop(_WARNINGS, None)
        os.environ[_WARNINGS] = "ignore"
        resource_tracker.ensure_running()
        os.environ.pop(_WARNINGS)
        if before is not None:
            os.environ[_WARNINGS] = before

    @property
    def is_warm(self) -> bool:
        """Whether the template has imported everything, or has had the time to."""
        if not self._is_warm:
            with contextlib.suppress(BlockingIOError):
                self._is_warm = bool(os.read(self._warm_read, 1))
        return self._is_warm or time.monotonic() > self._limit

    def ensure_running(self) -> None:
        """Start it unless it runs. Call this from the thread that lives as long as the agent: the
        kernel kills the template when that thread ends (``util/processes.py``)."""
        before = set(_children())
        forkserver.ensure_running()
        for pid in _children():
            if pid not in before:
                self.pid = pid
                log.info("template started: pid %d, preloads %s", pid, self._preload)


def _children() -> list[int]:
    """Return the agent's own children, which are templates and orphans that it has adopted."""
    children = psutil.Process().children()
    return [child.pid for child in children if not is_resource_tracker(child)]
