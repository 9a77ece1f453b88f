"""The Python that workers run with, where it is not the supervisor's own.

The supervisor starts the agent with it, whose children are the template and the workers; so torch
and whatever the script imports come from there, and nothing of it enters the supervisor.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import msgspec

from elastic_ckpt import __version__
from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.processes import environment_of
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.versions import work_together

OLDEST: Final = (3, 10)
ANSWER_SECONDS: Final = 60.0
"""An interpreter on a network file system that was not used for a while takes some seconds."""

# As the agent starts: the working directory must not shadow the packages.
_ASK: Final = """
import sys
sys.path[:1] = []
import json
from importlib.util import find_spec
from importlib.metadata import PackageNotFoundError, version
found = {"python": list(sys.version_info[:3]), "torch": find_spec("torch") is not None}
found["packages"] = {}
for name in ("torch", "colossalai", "transformers", "peft"):
    try:
        found["packages"][name] = version(name)
    except PackageNotFoundError:
        pass
try:
    if find_spec("elastic_ckpt") is not None:
        import elastic_ckpt
        found["version"] = elastic_ckpt.__version__
        import elastic_ckpt.supervisor.agent.agent
        if sys.argv[1:]:
            from elastic_ckpt.cli.run.entry import find_file
            from elastic_ckpt.errors import UsageError
            try:
                found["module"] = str(find_file(None, sys.argv[1]))
            except UsageError as error:
                found["no_module"] = str(error)
except Exception as error:
    found["error"] = type(error).__name__ + ": " + str(error)
print("\\n" + json.dumps(found))
"""


class InterpreterAnswer(msgspec.Struct, frozen=True):
    """What another interpreter says of itself.

    Attributes:
        python: its version.
        torch: whether it has torch, which is not imported.
        version: its elastic-ckpt's; empty without.
        error: why that cannot be imported.
        packages: versions of packages that matter, those that it has.
        module, no_module: the file of the module that was asked for, or why there is none.
    """

    python: tuple[int, int, int]
    torch: bool
    packages: dict[str, str] = {}
    version: str = ""
    error: str = ""
    module: str = ""
    no_module: str = ""


def find_python(given: str) -> str:
    """Return the absolute path of an interpreter: a path, or a name to look for on PATH. A link is
    not followed, because it is what makes a virtual environment.

    Raises:
        UsageError: there is no such program.
    """
    found = shutil.which(given) if os.sep not in given else given
    path = Path(found or given)
    if path.is_dir():
        raise UsageError(f"--python {given} is a directory: give {path / 'bin' / 'python'}")
    if found is None or not path.is_file():
        raise UsageError(f"no interpreter {given}: give --python the path of the job's Python")
    if not os.access(path, os.X_OK):
        raise UsageError(f"may not execute {given}: fix its permissions")
    return str(path.absolute())


def check_python(python: str, module: str = "") -> None:
    """Check before a start that workers can run with an interpreter; empty for this one. With the
    module that it was asked for already it is asked once.

    Raises:
        UsageError: they cannot; the message says what to type.
    """
    if not python:
        if find_spec("torch") is None:
            raise UsageError(
                f"{sys.executable} has no torch: name the job's own Python by --python PATH, or "
                f"{sys.executable} -m pip install torch"
            )
        return
    found = ask_python(python, module)
    if found.python[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        shown = ".".join(map(str, found.python))
        raise UsageError(f"{python} is Python {shown}: elastic-ckpt needs {oldest} or newer")
    install = f"{python} -m pip install {requirement()}"
    if not found.version and not found.error:
        raise UsageError(f"{python} has no elastic-ckpt: {install}")
    if found.version and not work_together(found.version, __version__):
        raise UsageError(
            f"{python} has elastic-ckpt {found.version}, which does not work with this one's "
            f"{__version__}: {install}"
        )
    if found.error:
        raise UsageError(f"{python} cannot import elastic-ckpt: {found.error}: {install}")
    if not found.torch:
        raise UsageError(f"{python} has no torch: {python} -m pip install torch")


def requirement() -> str:
    """Return what ``pip install`` takes to install this same elastic-ckpt: the file or directory
    that it came from, as pip noted it (PEP 610), or else its name and version."""
    with contextlib.suppress(PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        noted = distribution("elastic-ckpt").read_text("direct_url.json") or "{}"
        url = urlsplit(json.loads(noted)["url"])
        source = Path(unquote(url.path))
        if url.scheme == "file" and source.exists():
            return shlex.quote(str(source))
    return f"elastic-ckpt=={__version__}"


def module_file(python: str, module: str) -> Path:
    """Return the file of a module as that interpreter finds it.

    Raises:
        UsageError: it finds none.
    """
    found = ask_python(python, module)
    if not found.module:
        check_python(python, module)
        raise UsageError(found.no_module or f"{python} does not find the module {module}")
    return Path(found.module)


@functools.cache  # a reload of the job file would ask again
def ask_python(python: str, module: str = "") -> InterpreterAnswer:
    """Ask an interpreter for what a run needs to know.

    Raises:
        UsageError: it does not answer as a Python does.
    """
    words = [python, "-c", _ASK, *([module] if module else [])]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS,
            check=False, stdin=subprocess.DEVNULL, env=environment_of(python, os.environ),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UsageError(f"{python} did not answer within {ANSWER_SECONDS:.0f} s") from None
    except OSError as error:
        raise UsageError(f"cannot start {python}: {error.strerror or error}") from None
    lines = done.stdout.splitlines() or [""]
    try:
        return msgspec.json.decode(lines[-1], type=InterpreterAnswer)
    except (msgspec.MsgspecError, ValueError):
        said = (done.stderr.strip().splitlines() or lines)[-1]
        raise UsageError(
            f"{python} does not work as a Python: exit {done.returncode}: {printable(said, 200)}"
        ) from None
