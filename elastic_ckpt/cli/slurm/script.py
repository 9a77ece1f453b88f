"""The batch script that ``slurm submit`` writes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import elastic_ckpt
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.run.job_file import BatchKeys
from elastic_ckpt.cli.slurm.checks import find_absolute, is_array, node_range
from elastic_ckpt.cli.slurm.sbatch_options import SbatchOption
from elastic_ckpt.errors import UsageError

_SCRIPT: Final = """\
#!/bin/bash
{directives}

# A signal to this shell (scancel, the time limit, --signal=B:USR1@120) becomes a notice: srun
# passes USR1 on to all supervisors. It would answer TERM by killing its tasks.
step= signalled=
notice() {{
    signalled=$1
    [ -z "$step" ] || kill -s "$1" "$step" 2>/dev/null
}}
trap 'notice USR1' TERM INT HUP USR1
trap 'notice USR2' USR2

# 75 and 76 ask for another run, unless the job was cancelled meanwhile.
finish() {{
    {interpreter} -m elastic_ckpt slurm requeue-hook "$1"
    exit
}}
{environment}{setup}
# One supervisor per node; it launches the workers. Since 22.05 srun does not inherit the number of
# processors, and after --export=NONE not this environment; some sites end a step with its first
# task.
[ -z "$signalled" ] || finish 76
srun ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} --export=ALL \\
    --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0{srun} \\
    {python} -m elastic_ckpt run --config {config} \\
    --dir {directory}{mirror} &
step=$!
[ -z "$signalled" ] || kill -s "$signalled" "$step"
while kill -0 "$step" 2>/dev/null; do
    wait "$step" # a signal ends it early
done
wait "$step"
code=$?
case $code in
129 | 130 | 138 | 140 | 143) code=76 ;; # a signal before it could be taken as a notice
esac
finish "$code"
"""

_SETUP: Final = """
# setup, from the job file. The nodes get the environment that it leaves.
# A line counts by its own status: a file that it sources may have commands that fail.
failed() {{
    local place="line $(($1 - setup_begins)) of setup in "{job_file}
    if [ ${{#BASH_SOURCE[@]}} -gt "$setup_depth" ]; then
        [[ $- = *e* ]] || return 0
        place="line $1 of ${{BASH_SOURCE[1]}}"
    fi
    [ -z "$signalled" ] || finish 76
    echo "elastic-ckpt: setup failed: $2 ($place)" >&2
    exit 70
}}
trap 'failed "$LINENO" "$BASH_COMMAND"' ERR
setup_depth=$((${{#BASH_SOURCE[@]}} + 1)) setup_begins=$LINENO
{lines}
trap - ERR
set +eu
"""

_TASK: Final = '/task-"$SLURM_ARRAY_TASK_ID"'
_STANDARD: Final = frozenset({"/bin", "/usr/bin", "/usr/local/bin"})


def batch_script(
    job_file: Path,
    params: Mapping[str, Any],
    keys: BatchKeys,
    options: Sequence[SbatchOption] = (),
) -> str:
    """Return the batch script for sbatch.

    Args:
        job_file: its absolute path.
        params: the options of ``run`` from the job file.
        keys: the keys of the job file for this script.
        options: of the job, for sbatch; with an array each task has its own directory.

    Raises:
        UsageError: a path or an option does not fit a line.
    """
    task = _TASK if is_array(options) else ""
    directory = params["directory"]
    if isinstance(directory, Path):
        directory = directory.absolute()
    mirror = params.get("mirror")
    interpreter = _quoted(sys.executable)
    setup = "\n".join(keys.setup)
    return _SCRIPT.format(
        directives="\n".join(_directives(str(directory), params, options)),
        interpreter=interpreter,
        environment=_environment(),
        setup=_SETUP.format(lines=setup, job_file=_quoted(str(job_file))) if setup.strip() else "",
        srun="".join(f" {_quoted(word)}" for word in keys.srun),
        python=find_absolute(keys.python, job_file) or interpreter,
        config=_quoted(str(job_file)),
        directory=_quoted(_below(directory)) + task,
        mirror=f" --mirror {_quoted(mirror.rstrip('/'))}{task}" if mirror and task else "",
    )


def _below(directory: Path | BucketUrl) -> str:
    return str(directory).rstrip("/") or "/"


def _directives(
    directory: str, params: Mapping[str, Any], options: Sequence[SbatchOption]
) -> list[str]:
    least, most = node_range((), params)
    default = [
        SbatchOption("job-name", _word(params.get("name") or directory.rpartition("/")[2])),
        SbatchOption("nodes", f"{least}-{most}" if most > least else str(least)),
        SbatchOption("ntasks-per-node", "1"),
        SbatchOption("requeue"),
        SbatchOption("open-mode", "append"),
        SbatchOption("output", "slurm-%A_%a.out" if is_array(options) else "slurm-%j.out"),
        SbatchOption("chdir", str(Path.cwd())),
    ]
    given = {option.name for option in options}
    if "no-requeue" in given:
        given.add("requeue")
    kept = [option for option in default if option.name not in given]
    return [option.line for option in (*kept, *options)]


def _environment() -> str:
    """Return lines for what the job needs of this environment, which --export=NONE leaves out."""
    lines = []
    sbatch = shutil.which("sbatch")
    if sbatch and str(Path(sbatch).parent) not in _STANDARD:  # where srun and scontrol are as well
        lines.append(f'export PATH="$PATH":{_quoted(str(Path(sbatch).parent))}')
    home = Path(elastic_ckpt.__file__).parents[1]
    named = (Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry)
    if any(entry.resolve() == home.resolve() for entry in named):
        lines.append(f'export PYTHONPATH={_quoted(str(home))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    return "".join(f"{line}\n" for line in ["", *lines]) if lines else ""


def _quoted(word: str) -> str:
    """Quote for the shell.

    Raises:
        UsageError: the word has a character that is not printable.
    """
    if not word.isprintable():
        raise UsageError(f"{word!r:.200} cannot be in a batch script: rename it")
    return shlex.quote(word)


def _word(text: str) -> str:
    """Return a text that is safe as the name of a job."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text) or "job"
