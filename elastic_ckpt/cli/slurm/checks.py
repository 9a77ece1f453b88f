"""What ``slurm submit`` refuses before anything is queued."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.run.job_file import BatchKeys
from elastic_ckpt.cli.slurm.sbatch_options import SbatchOption, value_of
from elastic_ckpt.errors import DirectoryUnusable, UsageError
from elastic_ckpt.jobdir.answering import require_answer
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import quoted
from elastic_ckpt.jobdir.slurm_jobs import task_directory, task_numbers
from elastic_ckpt.protocol.rendezvous import parse_nodes
from elastic_ckpt.util.text import printable

_ELSEWHERE: Final[Mapping[str, str]] = {
    "wrap": "the script is written from the job file; put lines that run before it into setup",
    "dry-run": "put it before --, as in: elastic-ckpt slurm submit job.toml --dry-run -- --time=60",
    "wait": "submit does not wait; watch the job with elastic-ckpt status --watch JOBID",
    "help": "type sbatch --help",
    "usage": "type sbatch --usage",
    "version": "type sbatch --version",
}
_STEP_SIGNALS: Final = ("TERM", "INT", "USR1", "USR2")
_SHELL_SIGNALS: Final = (*_STEP_SIGNALS, "HUP")
_BASH_SECONDS: Final = 30.0


def check_options(options: Sequence[SbatchOption], params: Mapping[str, Any]) -> None:
    """Refuse options of sbatch that a supervised job cannot have.

    Args:
        params: the options of ``run`` from the job file.

    Raises:
        UsageError: an option would start several supervisors on a node, or end the script.
    """
    for option in options:
        if option.name in _ELSEWHERE:
            raise UsageError(f"--{option.name} cannot be submitted: {_ELSEWHERE[option.name]}")
        if option.name.startswith("container"):
            raise UsageError(
                f"{printable(option.shown, 80)} puts the batch shell into the container, where "
                f'srun is missing: write srun = ["{printable(option.shown, 80)}"] in the job file'
            )
        if option.name == "signal":
            _check_signal(option)
        if option.name in ("output", "error"):
            _check_output(option, value_of(options, "chdir") or "")
    nodes = value_of(options, "nodes")
    if nodes is not None:
        _check_nodes(nodes, params.get("nnodes"))
    _check_tasks(options, node_range(options, params))
    if is_array(options):
        _check_array(params)


def is_array(options: Sequence[SbatchOption]) -> bool:
    """Whether these options submit a job array."""
    return value_of(options, "array") is not None


def first_task(options: Sequence[SbatchOption]) -> str:
    """Return the number of an array's first task, as ``_1``; empty without an array."""
    array = value_of(options, "array")
    if array is None:
        return ""
    found = re.match(r"\d+", array)
    return f"_{found[0]}" if found else "_TASK"


def node_range(options: Sequence[SbatchOption], params: Mapping[str, Any]) -> tuple[int, int]:
    """Return the minimum and maximum number of nodes of the job; (0, 0) if only SLURM knows."""
    nodes = value_of(options, "nodes")
    if nodes is None:
        return parse_nodes(params.get("nnodes") or "1")
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", nodes)
    return (int(found[1]), int(found[2] or found[1])) if found else (0, 0)


def _check_nodes(nodes: str, nnodes: str | None) -> None:
    least, most = parse_nodes(nnodes or "1")
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", nodes)
    if nnodes is None or found is None:
        return
    if int(found[1]) < least or int(found[2] or found[1]) > most:
        raise UsageError(
            f"--nodes={nodes} does not fit nnodes = {nnodes} of the job file: change nnodes, which "
            "becomes --nodes"
        )


def _check_tasks(options: Sequence[SbatchOption], nodes: tuple[int, int]) -> None:
    for name in ("ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket"):
        if (value := value_of(options, name)) is not None:
            raise UsageError(f"--{name}={value} starts {_SEVERAL}")
    per_node = value_of(options, "ntasks-per-node")
    if per_node not in (None, "1"):
        raise UsageError(f"--ntasks-per-node={per_node} starts {_SEVERAL}")
    tasks = value_of(options, "ntasks")
    if tasks is not None and (not tasks.isdecimal() or nodes != (int(tasks), int(tasks))):
        raise UsageError(
            f"--ntasks={printable(tasks, 20)} starts several supervisors on a node, or fewer than "
            "one: leave it out (there is one task per node, which starts the node's workers), and "
            "set nproc and nnodes in the job file"
        )


_SEVERAL: Final = (
    "several supervisors on a node, but one starts all of its workers: leave it out, and set nproc "
    "in the job file, or request GPUs (--gpus-per-node=8), and --cpus-per-task for all workers of "
    "a node"
)


def _check_signal(option: SbatchOption) -> None:
    """Refuse a signal that ends the batch shell, or that a supervisor does not take as a notice."""
    found = re.fullmatch(r"(?:([RB]+):)?(?:SIG)?(\w+)(?:@\d+)?", option.value or "", re.IGNORECASE)
    if found is None:
        return  # sbatch refuses it
    name = found[2].upper()
    if name.isdecimal():
        try:
            name = signal.Signals(int(name)).name.removeprefix("SIG")
        except ValueError:
            return
    to_shell = "B" in (found[1] or "").upper()
    allowed = _SHELL_SIGNALS if to_shell else _STEP_SIGNALS
    if name not in allowed:
        raise UsageError(
            f"{printable(option.shown, 80)}: {name} is not a notice: use "
            f"{'B:' if to_shell else ''}USR1 (or {', '.join(n for n in allowed if n != 'USR1')})"
        )


def _check_output(option: SbatchOption, start: str) -> None:
    """Refuse a file in a folder that is missing here: SLURM would fail the job without output. One
    whose parent is only on the nodes is left to them, and so is a name that SLURM completes."""
    folder = Path.cwd() / start / os.path.dirname(option.value or "")
    if "%" in str(folder) or folder.exists() or not folder.parent.exists():
        return
    raise UsageError(
        f"{printable(option.shown, 80)}: SLURM does not make the folder of this file, and fails "
        f"the job without it: mkdir {quoted(str(folder))}"
    )


def _check_array(params: Mapping[str, Any]) -> None:
    """Refuse what all tasks of an array would share; each has a directory and a mirror."""
    for key in ("watch", "finished-when", "metrics-file", "rdzv-endpoint"):
        if params.get(key.replace("-", "_")):
            raise UsageError(
                f"{key} in the job file would be the same for all tasks of the array: leave it out "
                "or submit a job per task; or write a batch script of your own with run --dir, "
                f"--{key} and $SLURM_ARRAY_TASK_ID (start from --dry-run)"
            )


def check_settings(
    params: Mapping[str, Any], nodes: tuple[int, int], *, is_elsewhere: bool
) -> None:
    """Check the options of ``run`` as the job will, as far as that can be done here.

    Args:
        nodes: the minimum and maximum number of nodes of the job; (0, 0) if unknown.
        is_elsewhere: the script and the modules are those of a container or another environment.

    Raises:
        UsageError: an option is invalid, or the script is missing.
        DirectoryUnusable: the job directory cannot be one.
    """
    from elastic_ckpt.cli.run.build_settings import build_settings

    given = dict(params)
    # In the job SLURM is detected, and tells the grace and where several nodes meet.
    others = tuple(name for name in given["notice_source"] if name not in ("slurm", "auto"))
    given["notice_source"] = others or ("none",)
    if given["grace"] is None:
        given["grace"] = 30.0
    if max(parse_nodes(given["nnodes"] or "1")[1], nodes[1]) > 1:
        given["nnodes"] = given["nnodes"] or str(nodes[1])
        given["rdzv_endpoint"] = given["rdzv_endpoint"] or "localhost"
    if is_elsewhere:
        given["module"], given["script"] = None, __file__
    try:
        build_settings(**given)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a link loop, no such user
        raise UsageError(printable(str(error))) from None


def check_directory(directory: Path | BucketUrl) -> None:
    """Check the job directory, if it is here, or would be made here; one whose parent is only on
    the nodes is left to them.

    Raises:
        DirectoryUnusable: it does not answer, is not a directory, or cannot be written to.
    """
    if isinstance(directory, BucketUrl):
        return
    require_answer(directory)
    if directory.exists():
        JobDirectory.at(directory).check_readable()
    place = directory if directory.exists() else directory.absolute().parent
    if place.exists() and not os.access(place, os.W_OK | os.X_OK):
        raise DirectoryUnusable(f"cannot write to {place}: fix its permissions, or choose another")


def check_queue(directory: Path | BucketUrl, options: Sequence[SbatchOption]) -> None:
    """Check that no job of the same directory is in SLURM's queue: only one can run in it.

    Raises:
        UsageError: there is one, and these options do not let this one wait for it.
    """
    from elastic_ckpt.cli.slurm.queue import conflicting

    if isinstance(directory, BucketUrl) or value_of(options, "dependency") is not None:
        return
    directory = directory.absolute()
    tasks = task_numbers(value_of(options, "array") or "")
    other = conflicting([task_directory(directory, one) for one in tasks] or [directory])
    if other is not None:
        why = f"{other.state}, {other.reason}" if other.reason else other.state
        raise UsageError(
            f"job {other.number} of the same directory, {other.job.directory}, is in SLURM's queue "
            f"({why}), and only one can run there: scancel {other.number} first, or submit this "
            f"one with -- --dependency=afterany:{other.number}"
        )


def is_elsewhere(keys: BatchKeys) -> bool:
    """Whether the job runs in a container or another environment than this process."""
    return bool(keys.python) or any(word.startswith("--container") for word in keys.srun)


def check_keys(keys: BatchKeys) -> None:
    """Check the keys for the batch script.

    Raises:
        UsageError: a key would change what srun starts, or how many.
    """
    for word in keys.srun:
        if not word.startswith("--") or not word.isprintable():
            raise UsageError(
                f"srun in the job file has {printable(word, 80)!r}: give options as single words, "
                '"--name=value"'
            )
        if word.startswith("--ntasks"):
            raise UsageError(f"{printable(word, 80)} in srun starts {_SEVERAL}")
    if not keys.python.isprintable():
        raise UsageError("supervisor-python in the job file must be one line")


def check_syntax(script: str) -> None:
    """Let bash read the script, without running it, if there is one here.

    Raises:
        UsageError: setup or supervisor-python is not valid shell.
    """
    bash = shutil.which("bash")
    if bash is None:
        return
    try:
        done = subprocess.run(
            [bash, "-n"], input=script, capture_output=True, text=True,
            timeout=_BASH_SECONDS, check=False, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["invalid"]
        what = re.sub(r"^.*?line (\d+): ", r"line \1 of the script: ", lines[0])
        raise UsageError(f"setup or supervisor-python is not valid shell: {printable(what)}")


def find_absolute(words: str, job_file: Path) -> str:
    """Return ``supervisor-python`` of a job file; one relative path is seen from that file."""
    is_path = re.fullmatch(r"[\w./+-]+", words) and "/" in words and not words.startswith("/")
    return str(job_file.parent / words) if is_path else words
