"""Preloaded by the forkserver last: imports what the job's workers were seen to import.

A fork copies one thread, no state of a GPU, and random generators as they are. So afterwards the
process looks at itself and says whether workers may be forked from it; the agent waits for that
word (``template_process.py``).
"""

from __future__ import annotations

import importlib
import os
import random
import sys
import threading
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import msgspec

from elastic_ckpt.core.text import printable
from elastic_ckpt.store.preload import is_installed
from elastic_ckpt.supervisor import template
from elastic_ckpt.supervisor.template_process import PLAN_VARIABLE, Plan


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
            return "an import began to use CUDA"
        if self.threads > before.threads or self.native_threads > before.native_threads:
            return "an import started a thread"
        if self.random != before.random:
            return "an import drew random numbers or set a seed"
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


def _import_installed(plan: Plan) -> None:
    own = (plan.script_directory, os.getcwd())
    path = [plan.script_directory, *sys.path]
    found: dict[str, bool] = {}
    for module in plan.modules:
        top = module.partition(".")[0]
        if top not in found:
            found[top] = _finds_installed(top, path, own)
        if found[top]:
            _import(module)


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


def _carry_out(plan: Plan) -> None:
    if "numpy" in sys.modules:
        import numpy.random  # noqa: F401  # some versions wait until it is used
    before = _Traces.here()
    _import_installed(plan)
    _say(plan, _Traces.here().changed_since(before))


def _say(plan: Plan, verdict: str) -> None:
    draft = Path(f"{plan.verdict}.new")
    draft.write_text(printable(verdict))
    draft.replace(plan.verdict)


if PLAN_VARIABLE in os.environ:
    _carry_out(msgspec.json.decode(Path(os.environ.pop(PLAN_VARIABLE)).read_bytes(), type=Plan))
template.restore_environment()
