"""The agent's end of the template, the process that workers are forked from."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, Final

import msgspec

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.preload_file import Preload, read_preload, write_preload
from elastic_ckpt.journal.events import PreloadHarmful, PreloadRefused
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.messages import WorkerSpec
from elastic_ckpt.supervisor.agent.launch import WORKER_ENTRY

log = logging.getLogger(__name__)

PLAN_VARIABLE: Final = "ELASTIC_CKPT_LEARNED"
"""Names the file with the plan."""

IMPORT_SECONDS: Final = 300.0
"""Imports that take longer hang."""

_POLL_SECONDS: Final = 0.005

_BASE: Final = (
    "elastic_ckpt.supervisor.agent.template",
    "elastic_ckpt.supervisor.agent.launch",
    WORKER_ENTRY,
    "elastic_ckpt.training.session",
    "elastic_ckpt.training.functions",
    "torch._dynamo",  # making an optimizer imports it, which takes longer than torch itself
)
_LAST: Final = "elastic_ckpt.supervisor.agent.learned_imports"


class Plan(msgspec.Struct, frozen=True):
    """What the template imports beside its base.

    Attributes:
        modules: in this order.
        harmful: those that it leaves out, with the reasons; None to find them out.
        script_directory: where the script would look first.
        verdict: the file that appears at the end, with a :class:`Verdict`.
    """

    modules: tuple[str, ...]
    harmful: dict[str, str] | None
    script_directory: str
    verdict: str


class Verdict(msgspec.Struct, frozen=True):
    """How the imports went.

    Attributes:
        harmful: modules that were left out, with the reasons.
        refused: why no worker may be forked all the same; empty if they may.
    """

    harmful: dict[str, str] | None = None
    refused: str = ""


class Template:
    """Started once by the agent; multiprocessing starts it anew, from the base, if it is killed.

    Args:
        spec: what it is told to import, and of which job it may learn.
        scratch: a directory that is removed with the agent.
    """

    def __init__(self, spec: WorkerSpec, scratch: Path) -> None:
        self._spec = spec
        self._job = JobDirectory(Path(spec.directory))
        self._plan_file = scratch / "learned.json"
        self._verdict = scratch / "verdict"
        learned = read_preload(self._job) if spec.learn_preload else Preload()
        self._learned = Preload() if learned.refused else learned

    def start(self) -> None:
        """Start it with its imports under way; :meth:`wait` must follow.

        From the thread that lives as long as the agent: see ``processes.py``.
        """
        multiprocessing.set_forkserver_preload([*_BASE, *self._spec.preload, _LAST])
        # Semaphores that killed workers leave are its business, and no news for the user.
        os.environ["PYTHONWARNINGS"] = "ignore"
        resource_tracker.ensure_running()
        os.environ.pop("PYTHONWARNINGS")
        learned = self._learned
        if learned.modules:
            directory = str(Path(self._spec.script).parent)
            plan = Plan(learned.modules, learned.harmful, directory, str(self._verdict))
            self._plan_file.write_bytes(msgspec.json.encode(plan))
            os.environ[PLAN_VARIABLE] = str(self._plan_file)
        forkserver.ensure_running()
        os.environ.pop(PLAN_VARIABLE, None)
        preload = [*self._spec.preload, f"{len(learned.modules)} modules that were learned"]
        log.info("template started: pid %d, preloads %s", _template_pid(), ", ".join(preload))

    def wait(self) -> None:
        """Wait, bounded, until workers may be forked; without what it learned if need be."""
        modules = self._learned.modules
        if not modules:
            return
        began = time.monotonic()
        verdict = self._outcome()
        log.info("template waited for, %.3f s", time.monotonic() - began)
        found = Preload(modules, verdict.harmful, verdict.refused)
        if found != self._learned:
            write_preload(self._job, found)
            self._tell(verdict)
        if verdict.refused:
            _end_template()
            forkserver.ensure_running()

    def _tell(self, verdict: Verdict) -> None:
        journal = Journal(self._job, self._spec.node)
        if verdict.harmful:
            log.warning("preload without %s", verdict.harmful)
            journal.write(PreloadHarmful(modules=verdict.harmful))
        if verdict.refused:
            log.warning("no preload of what was learned: %s", verdict.refused)
            journal.write(PreloadRefused(reason=verdict.refused))

    def _outcome(self) -> Verdict:
        limit = time.monotonic() + IMPORT_SECONDS
        while time.monotonic() < limit:
            gone = _template_is_gone()
            if self._verdict.exists():
                return msgspec.json.decode(self._verdict.read_bytes(), type=Verdict)
            if gone:
                return Verdict(refused="an import ended the process")
            time.sleep(_POLL_SECONDS)
        return Verdict(refused=f"the imports took more than {IMPORT_SECONDS:.0f} s")


def _template_is_gone() -> bool:
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT  # multiprocessing must find it, too
    return os.waitid(os.P_PID, _template_pid(), flags) is not None


def _end_template() -> None:
    os.kill(_template_pid(), signal.SIGKILL)
    os.waitid(os.P_PID, _template_pid(), os.WEXITED | os.WNOWAIT)


def _template_pid() -> int:
    # No public name; without it the template could not be told from other children.
    server: Any = forkserver
    return int(server._forkserver._forkserver_pid)
