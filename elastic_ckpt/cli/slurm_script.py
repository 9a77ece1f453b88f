"""The batch script of a job; ``scripts/slurm`` holds the same as files to copy."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_SCRIPT: Final = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}

# When a job is cancelled or out of time this shell is told, too, and has to stay until the save is
# done. It must not pass the signal on: srun would kill its tasks.
trap : TERM

# One supervisor on each node; it launches the workers. Since 22.05 srun does not take the number of
# processors over by itself.
srun ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} \\
    elastic-ckpt run --config {config}{directory}
code=$?

# 75 and 76 ask for another run. Whether the job was cancelled meanwhile, SLURM knows.
elastic-ckpt slurm requeue-hook "$code"
"""


def batch_script(job_file: Path, params: Mapping[str, Any], options: Sequence[str] = ()) -> str:
    """The text for sbatch.

    Args:
        params: of the job file, as ``run`` has them.
        options: for sbatch; with an array each task has a directory of its own.
    """
    from elastic_ckpt.protocol.rendezvous import parse_nodes

    array = is_array(options)
    directory = Path(params["directory"]).absolute()
    task = f' --dir {shlex.quote(str(directory))}/task-"$SLURM_ARRAY_TASK_ID"'
    least, most = parse_nodes(params.get("nnodes") or "1")
    return _SCRIPT.format(
        name=_word(params.get("name") or directory.name),
        nodes=f"{least}-{most}" if most > least else str(least),
        output="slurm-%A_%a.out" if array else "slurm-%j.out",
        config=shlex.quote(str(job_file)),
        directory=task if array else "",
    )


def is_array(options: Sequence[str]) -> bool:
    """Whether these options of sbatch make an array of jobs."""
    return "SBATCH_ARRAY_INX" in os.environ or any(
        option.startswith(("--ar", "-a")) for option in options
    )


def _word(text: str) -> str:
    """A name that can stand in a line of sbatch."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text) or "job"
