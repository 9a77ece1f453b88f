"""Preloaded by the forkserver last: imports what the job's workers were seen to import.

A fork copies one thread, no state of a GPU, and random generators as they are. So a module that
starts a thread, uses a GPU or draws random numbers stays the script's to import, and so does what
imports it. Which ones do is tried once, in children of this process; the agent waits for the word
on how it went (``template_process.py``).
"""

from __future__ import annotations

import importlib
import os
import random
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Final

import msgspec

from elastic_ckpt.jobdir.preload_file import is_installed
from elastic_ckpt.supervisor.agent import template
from elastic_ckpt.supervisor.agent.template_process import PLAN_VARIABLE, Plan, Verdict
from elastic_ckpt.util.processes import die_with_parent

MODULE_SECONDS: Final = 60.0
"""A module whose import takes longer hangs."""

MOST_HARMFUL: Final = 20
"""Where there are more, it is not worth while to try on."""

_DONE: Final = b"."


@dataclass(frozen=True)
class _Traces:
    """What an import leaves behind and a worker would notice."""

    threads: int
    native_threads: int
    cuda: bool
    random: tuple[object, ...]

    @classmethod
    def here(cls) -> _Traces:
        return cls(threading.active_count(), _lasting_threads(), _uses_cuda(), _random_state())

    def changed_since(self, before: _Traces) -> str:
        if self.cuda and not before.cuda:
            return "its import begins to use CUDA"
        if self.threads > before.threads or self.native_threads > before.native_threads:
            return "its import starts a thread"
        if self.random != before.random:
            return "its import draws random numbers or sets a seed"
        return ""


def _lasting_threads() -> int:
    """Threads of this process that a fork does not end.

    OpenBLAS, for one, ends its threads before a fork and starts them again when it needs them.
    """
    if len(os.listdir("/proc/self/task")) > 1:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return len(os.listdir("/proc/self/task"))


def _uses_cuda() -> bool:
    for fd in os.listdir("/proc/self/fd"):
        try:
            if str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("/dev/nvidia-uvm"):
                return True
        except OSError:  # the descriptor of the listing itself
            continue
    cuda: Any = sys.modules.get("torch.cuda")
    return cuda is not None and bool(cuda.is_initialized())


def _random_state() -> tuple[object, ...]:
    state: list[object] = [random.getstate()]
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        state.append(torch.get_rng_state().numpy().tobytes())
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        name, key, *rest = numpy_random.get_state()
        state.append((name, key.tobytes(), *rest))
    return tuple(state)


class _LeftOut(BaseException):
    """Not an ``ImportError``: a module must not think that another one is not installed."""


class _Leaver(MetaPathFinder):
    """Ends the import of whatever imports one of these modules."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name in self._names:
            raise _LeftOut(name)


def _import_installed(
    plan: Plan, left_out: Iterable[str], before_each: Callable[[str], None] = lambda _: None
) -> Iterator[str]:
    """Import all but some; yields each behind its import."""
    own = (plan.script_directory, os.getcwd())
    path = [plan.script_directory, *sys.path]
    found: dict[str, bool] = {}
    leaver = _Leaver(left_out)
    sys.meta_path.insert(0, leaver)
    try:
        for module in plan.modules:
            top = module.partition(".")[0]
            if top not in found:
                found[top] = _finds_installed(top, path, own)
            if found[top]:
                before_each(module)
                _import(module)
                yield module
    finally:
        sys.meta_path.remove(leaver)


def _finds_installed(top: str, path: list[str], own: tuple[str, ...]) -> bool:
    """Whether the script would get an installed package, and not a file of its own."""
    spec = PathFinder.find_spec(top, path)
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return bool(places) and all(is_installed(place, own) for place in places)


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except BaseException:  # whatever it is: the script that imports it will say so itself
        return


# -- the trial ------------------------------------------------------------------------------------


def _find_harmful(plan: Plan) -> dict[str, str]:
    """The modules that workers must import themselves, with the reasons."""
    harmful: dict[str, str] = {}
    while len(harmful) < MOST_HARMFUL:
        found = _try_in_child(plan, harmful)
        if found is None:
            return harmful
        module, reason = found
        if not module:
            return dict.fromkeys(plan.modules, reason)
        harmful[module] = reason
    return dict.fromkeys(plan.modules, f"{MOST_HARMFUL} of them are harmful")


def _try_in_child(plan: Plan, harmful: Iterable[str]) -> tuple[str, str] | None:
    """Import everything in a child; the first module that does harm, and what it did."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            os.close(reading)
            _import_and_tell(plan, harmful, writing)
        finally:
            os._exit(0)
    os.close(writing)
    told = b""
    try:
        while select.select([reading], [], [], MODULE_SECONDS)[0]:
            more = os.read(reading, 65536)
            if not more:
                break
            told += more
        else:
            return _last(told), f"its import takes more than {MODULE_SECONDS:.0f} s"
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    verdict = told.rpartition(b"!")[2].decode()
    if told.endswith(_DONE):
        return None
    return _last(told), verdict if b"!" in told else "its import ends the process"


def _import_and_tell(plan: Plan, harmful: Iterable[str], fd: int) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    before = _Traces.here()
    for _ in _import_installed(plan, harmful, lambda name: _tell(fd, f"{name}\n")):
        reason = _Traces.here().changed_since(before)
        if reason:
            _tell(fd, f"!{reason}")
            os._exit(0)
    os.write(fd, _DONE)


def _tell(fd: int, text: str) -> None:
    os.write(fd, text.encode())


def _last(told: bytes) -> str:
    """The module whose import was the last to begin."""
    lines = told.partition(b"!")[0].decode().split()
    return lines[-1] if lines else ""


# -- at the template's start ----------------------------------------------------------------------


def _carry_out(plan: Plan) -> None:
    if "numpy" in sys.modules:
        import numpy.random  # noqa: F401  # some versions wait until it is used
    harmful = _find_harmful(plan) if plan.harmful is None else plan.harmful
    before = _Traces.here()
    for _ in _import_installed(plan, harmful):
        pass
    _say(plan, Verdict(harmful, _Traces.here().changed_since(before)))


def _say(plan: Plan, verdict: Verdict) -> None:
    draft = Path(f"{plan.verdict}.new")
    draft.write_bytes(msgspec.json.encode(verdict))
    draft.replace(plan.verdict)


if PLAN_VARIABLE in os.environ:
    _carry_out(msgspec.json.decode(Path(os.environ.pop(PLAN_VARIABLE)).read_bytes(), type=Plan))
template.restore_environment()
